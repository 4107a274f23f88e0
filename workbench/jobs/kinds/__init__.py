"""The probes that cells can name, a module for each sort."""

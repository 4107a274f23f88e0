"""Who runs cells: worker processes of this machine, or actors of a Ray cluster."""

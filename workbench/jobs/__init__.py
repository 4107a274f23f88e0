"""Grids of experiments that survive anything: what a cell is, where its result stands, who computes it."""

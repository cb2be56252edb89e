"""Grids of methods side by side."""

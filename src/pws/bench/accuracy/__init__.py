"""Accuracy side by side: grids of method, learning rate, batch size and seed."""

from pws.bench.accuracy.grid import Cell, Grid, load_grid, shipped_grids
from pws.bench.accuracy.pool import run_grid

__all__ = ["Cell", "Grid", "load_grid", "run_grid", "shipped_grids"]

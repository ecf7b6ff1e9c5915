"""Grids of runs: what trains and measures them, one after another or spread over machines, and compares them."""

from .grid import Grid, GridRun, load_grid


__all__ = ["Grid", "GridRun", "load_grid"]

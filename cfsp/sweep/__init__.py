"""Experiments: grids of runs, what of them is done, and how the rest is launched."""

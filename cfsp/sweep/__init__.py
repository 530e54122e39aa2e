"""Experiments: grids of runs, their composed configurations, and the state of each run."""

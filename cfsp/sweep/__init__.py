"""Experiments as grids of runs: composed configurations, jobs and their states."""

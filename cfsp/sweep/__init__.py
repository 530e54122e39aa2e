"""Experiments as grids of runs: composed configurations, jobs and their states.

It may import pipeline and the packages below; launcher and tables and the packages above may import it.
"""

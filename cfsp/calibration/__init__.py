"""Calibration sets, one pass over them, and the statistics that the pass collects."""

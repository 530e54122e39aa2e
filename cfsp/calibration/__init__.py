"""Calibration sets, one pass over them, and the statistics it collects."""

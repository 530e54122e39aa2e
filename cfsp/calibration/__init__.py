"""Calibration sets, one pass over them, and the statistics that the pass collects.

It may import sparsity and the packages below; importance and the packages above may import it.
"""

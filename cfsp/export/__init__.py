"""Exports: a model folder in the formats that other tools load, one module for each format; model cards."""

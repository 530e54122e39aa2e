"""Exports: a model folder in the formats that other tools load, one module for each format; model cards.

It may import record and logger and the packages below; pipeline and the packages above may import it. Inspection and
verify and export do not import each other.
"""

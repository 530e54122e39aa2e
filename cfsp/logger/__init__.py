"""Loggers: mirrors of the record of a run.

It may import checkpoint and the packages below; inspection, verify and export and the packages above may import it.
Record and logger do not import each other.
"""

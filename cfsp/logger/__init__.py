"""Loggers: mirrors of the record of a run."""

"""Loggers: mirrors of the record."""

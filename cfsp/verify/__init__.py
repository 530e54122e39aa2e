"""Comparison of a saved model in other tools with what it computed in memory when it was saved.

It may import record and logger and the packages below; pipeline and the packages above may import it. Inspection and
export and verify do not import each other.
"""

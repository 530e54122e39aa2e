"""Model inspection (``cfsp inspect``): what a model is and what could be removed from it, without weights.

It may import record and logger and the packages below; pipeline and the packages above may import it. Verify and
export and inspection do not import each other.
"""

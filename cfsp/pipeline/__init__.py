"""One run: preflight, stages, recovery, saving, and what becomes of a failure."""

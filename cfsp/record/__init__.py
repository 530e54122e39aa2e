"""Records of runs: record.json, the environment, figures, and the check that a finished run is whole.

It may import checkpoint and the packages below; inspection, verify and export and the packages above may import it.
Logger and record do not import each other.
"""

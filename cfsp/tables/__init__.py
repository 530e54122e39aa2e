"""Tables, figures and reports of experiments, and the summary at the end of a run. Records are the only input.

This package may import sweep and the packages below it. Benchmark and the packages above may import this package.
Launcher and tables do not import each other.
"""

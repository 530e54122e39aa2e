"""The parts of ``scripts/benchmark.py``: each measures one thing, says what it found and which limits were missed."""

"""One forward pass over the calibration set, kept as statistics on disk."""

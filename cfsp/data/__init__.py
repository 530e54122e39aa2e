"""Token sources: calibration sets and evaluation texts, from the hub, a local file or the package."""

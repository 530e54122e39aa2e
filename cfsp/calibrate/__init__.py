"""One pass over the calibration set, and the statistics that it collects. Imports models and data, no later stage."""

"""Records of runs: record.json, the environment, figures, and the check that a finished run is whole."""

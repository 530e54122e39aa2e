"""Whether a saved model computes in other tools what it computed in memory when it was saved."""

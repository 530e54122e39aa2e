"""Comparison of a saved model in other tools with what it computed in memory when it was saved."""

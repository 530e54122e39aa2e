"""The pruning plan, and cutting one block by it."""

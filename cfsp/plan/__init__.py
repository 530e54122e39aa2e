"""The pruning plan, and slicing of one block by it."""

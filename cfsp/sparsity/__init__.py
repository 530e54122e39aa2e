"""The sparsity budget: the number of units that a ratio of a scope leaves, and widths that meet it."""

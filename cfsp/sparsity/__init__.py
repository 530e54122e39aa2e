"""The sparsity budget: what a ratio of a scope asks of the units, and widths that meet it."""

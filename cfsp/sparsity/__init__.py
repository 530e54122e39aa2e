"""The sparsity budget: the keep fraction for a ratio of a scope, and widths that meet it."""

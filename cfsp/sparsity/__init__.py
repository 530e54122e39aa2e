"""The sparsity budget: the keep fraction for a ratio of a scope, and widths that meet it.

It may import model and the packages below; calibration and the packages above may import it.
"""

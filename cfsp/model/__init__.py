"""A model that computes: loading, streaming and the block driver.

It may import pruned_model and the packages below; sparsity and the packages above may import it.
"""

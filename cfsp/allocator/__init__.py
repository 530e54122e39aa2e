"""Allocators: from scores and a budget to the sparsity of each block."""

"""Allocators: from scores and a budget to the keep ratio of each block.

It may import importance and the packages below; evaluation, recovery and pruner and the packages above may import it.
"""

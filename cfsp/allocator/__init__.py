"""Allocators: from scores and a budget to the keep ratio of each block."""

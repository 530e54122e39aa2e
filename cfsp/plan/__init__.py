"""The pruning plan, and slicing of one block by it.

It may import architecture and the packages below; weights and the packages above may import it.
"""

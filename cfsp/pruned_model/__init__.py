"""Classes of models whose layers have unequal sizes, and the code that ships with their folders.

It may import weights and the packages below; model and the packages above may import it.
"""

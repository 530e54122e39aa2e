"""Pruners: from statistics to a plan, and from a plan to a smaller model.

It may import allocator and the packages below; checkpoint and the packages above may import it. Evaluation and
recovery and pruner do not import each other.
"""

"""Evaluators: perplexity, zero-shot tasks and cost, with what they share.

It may import allocator and the packages below; checkpoint and the packages above may import it. Recovery and pruner
and evaluation do not import each other.
"""

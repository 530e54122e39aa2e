"""Recovery: training a pruned model.

It may import allocator and the packages below; checkpoint and the packages above may import it. Evaluation and pruner
and recovery do not import each other.
"""

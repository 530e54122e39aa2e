"""Recovery: training a pruned model."""

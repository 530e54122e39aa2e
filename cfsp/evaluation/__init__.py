"""Evaluators: perplexity, zero-shot tasks, cost."""

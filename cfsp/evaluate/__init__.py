"""Perplexity, zero-shot tasks and cost."""

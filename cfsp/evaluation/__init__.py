"""Evaluators: perplexity, zero-shot tasks and cost, with what they share."""

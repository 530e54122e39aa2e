"""Pruners: from statistics to a plan, and from a plan to a smaller model."""

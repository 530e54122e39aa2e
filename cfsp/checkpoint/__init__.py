"""Checkpoints: writing a model folder, and the reference that other tools are compared with."""

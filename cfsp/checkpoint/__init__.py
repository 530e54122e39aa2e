"""Checkpoints: writing a model folder, and the reference that other tools are compared with.

It may import evaluation, recovery and pruner and the packages below; record and logger and the packages above may
import it.
"""

"""Neuron metrics, one file each, and block distances. Metrics import the ground, never a stage above them."""

"""Neuron metrics, one file each. Metrics import the lower layers only, never a stage above them."""

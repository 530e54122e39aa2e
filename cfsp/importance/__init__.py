"""Neuron metrics (one file each) and block distances."""

"""A model that computes: loading, streaming and the block driver."""

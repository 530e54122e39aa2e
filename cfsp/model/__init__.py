"""A model that computes: loading, streaming, the block driver."""

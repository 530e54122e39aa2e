"""Model folders on disk: what lies in them, and how their tensors fit an architecture."""

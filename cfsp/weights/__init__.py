"""Model folders on disk: their sources, their files, and the fit of their tensors to an architecture."""

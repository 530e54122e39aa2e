"""Model folders on disk: their sources, their files, and the fit of their tensors to an architecture.

It may import plan and the packages below; pruned_model and the packages above may import it.
"""

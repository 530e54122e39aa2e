"""Views of an architecture, the block driver, model folders in and out."""

"""Model inspection (``cfsp inspect``): what a model is and what could be removed from it, without weights."""

"""``cfsp inspect``: what a model is and what could be removed from it, on the meta device, without weights."""

"""Plans, their application by real slicing, and the pruners that make them."""

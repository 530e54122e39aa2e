"""How much each block keeps, and the budget that the widths must meet."""

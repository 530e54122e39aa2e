"""Random bad input: overrides, damaged model folders, plans, records and texts. Helpers of the tests beside them."""

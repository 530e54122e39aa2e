"""Structure of a decoder: blocks with their FFN and attention, recognised by their matrices."""

"""Structure of a decoder: blocks with their FFN and attention, recognised by their matrices.

It may import data and the packages below; plan and the packages above may import it.
"""

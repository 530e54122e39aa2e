"""What a decoder is made of: blocks, their FFN and attention, recognised by structure."""

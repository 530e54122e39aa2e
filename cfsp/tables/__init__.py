"""How figures are named, ordered and shown."""

"""One component of every kind, as a package that is no part of cfsp would bring them."""

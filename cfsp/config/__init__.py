"""Configuration: schema, composition, components by ``_target_`` and their contracts, and run identity.

Modules of this package may import only :mod:`cfsp.system` and :mod:`cfsp.errors`; every package above may import them.
"""

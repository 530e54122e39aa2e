"""Files, memory, processes, leases and caches: the ground that every other package stands on.

Nothing here knows of models. Modules of this package may import only :mod:`cfsp.errors`; every package may import them.
"""

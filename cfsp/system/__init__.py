"""Files, memory, processes, leases and caches: the lowest package, which all others may import.

Nothing here knows of models. Modules of this package may import only :mod:`cfsp.errors`; every package may import them.
"""

"""Ground: files, memory, processes. It knows nothing of models and may import only :mod:`cfsp.errors`."""

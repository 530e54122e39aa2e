"""Texts: reading documents and rows, joining them as published, token ids, windows.

It uses only :mod:`cfsp.config`, :mod:`cfsp.system` and :mod:`cfsp.errors`. Packages from calibration upwards may import
it.
"""

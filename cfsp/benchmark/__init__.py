"""Benchmarks of ``cfsp benchmark``. Each part measures one quantity and states the limits that must hold.

Only the command line imports this package.
"""

"""One run: preflight, stages, recovery, saving, and the record of a failure.

Sweeps, launchers, tables and the command line import it. It imports the packages of the methods, never the reverse.
"""

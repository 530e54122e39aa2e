"""Parts of ``cfsp benchmark``. Each module measures one thing, and states its figures and the limits that must hold.

Only the command line imports it.
"""

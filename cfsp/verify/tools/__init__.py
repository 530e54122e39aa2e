"""Stand-alone scripts, one for each tool: they run in that tool's own environment and import nothing of cfsp."""

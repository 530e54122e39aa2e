"""The command line, with a file for each command. Nothing in cfsp but the entry points imports it."""

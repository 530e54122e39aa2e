"""The classes of models whose layers differ, and the code that ships with their folders."""

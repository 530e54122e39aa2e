"""Classes of models whose layers have unequal sizes, and the code that ships with their folders."""

"""Allocators: from scores and a budget to the share that each block keeps. Imports no stage above importance."""

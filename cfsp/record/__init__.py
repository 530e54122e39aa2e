"""The record of a run, its environment, and loggers that mirror it."""

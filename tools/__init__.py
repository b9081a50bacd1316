"""The `remend` command line: one module a verb, dispatched lazily by `tools.cli`."""

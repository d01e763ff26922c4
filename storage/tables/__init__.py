"""Tables: examples that are not a dataset yet, in memory or in any file, read block by block under one interface."""

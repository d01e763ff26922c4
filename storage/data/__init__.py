"""Datasets: which arrays a group has, how rows and chunks are read, how they are written."""

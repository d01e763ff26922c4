"""Datasets: finding the arrays of a group, reading rows and chunks, writing them."""

"""The run directory and its parts: weights, history, checkpoints, leases."""

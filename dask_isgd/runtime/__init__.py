"""Plumbing on Dask: topics, parameters, placement, and the private parts of Dask that cannot be avoided."""

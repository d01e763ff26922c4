"""Where files lie: a local folder, an object store, a Zarr store."""

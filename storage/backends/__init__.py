"""The places that hold files: local folders, object stores, Zarr stores."""

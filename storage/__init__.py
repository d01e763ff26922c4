"""Zarr and files: datasets, weights, history, checkpoints, leases, the run directory."""

from dask_isgd.storage.dataset import Dataset, Rows
from dask_isgd.storage.weights import WeightArray
from dask_isgd.storage.writing import write_dataset

__all__ = ["Dataset", "Rows", "WeightArray", "write_dataset"]

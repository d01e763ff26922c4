"""Zarr and files: datasets, weights, history, checkpoints, leases, the run directory."""

from dask_isgd.storage.checkpoints import Checkpoint, Checkpoints
from dask_isgd.storage.dataset import Dataset, Rows
from dask_isgd.storage.history import History, read_history
from dask_isgd.storage.leases import Leases
from dask_isgd.storage.raw import RawArray
from dask_isgd.storage.rundir import RunDirectory
from dask_isgd.storage.weights import WeightArray
from dask_isgd.storage.writing import write_dataset

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Dataset",
    "History",
    "Leases",
    "RawArray",
    "Rows",
    "RunDirectory",
    "WeightArray",
    "read_history",
    "write_dataset",
]

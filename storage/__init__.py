"""Zarr and files: datasets, weights, history, checkpoints, leases, the run directory."""

from dask_isgd.storage.data.dataset import Dataset, Rows
from dask_isgd.storage.data.raw import RawArray
from dask_isgd.storage.data.writing import write_dataset
from dask_isgd.storage.run.checkpoints import Checkpoint, Checkpoints
from dask_isgd.storage.run.directory import RunDirectory
from dask_isgd.storage.run.history import History, read_history
from dask_isgd.storage.run.leases import Leases
from dask_isgd.storage.run.outputs import OutputArray
from dask_isgd.storage.run.weights import WeightArray

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Dataset",
    "History",
    "Leases",
    "OutputArray",
    "RawArray",
    "Rows",
    "RunDirectory",
    "WeightArray",
    "read_history",
    "write_dataset",
]

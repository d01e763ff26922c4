"""Promises of the package as a whole."""

from processes import run


def test_public_names():
    import dask_isgd.storage

    assert dask_isgd.storage.__all__ == [
        "Checkpoint", "Checkpoints", "Dataset", "History", "Leases", "OutputArray", "RawArray", "Rows", "RunDirectory",
        "WeightArray", "read_history", "write_dataset",
    ]  # fmt: skip


def test_needs_neither_torch_nor_distributed():
    script = """
import sys
sys.modules.update(torch=None, distributed=None)
import numpy as np
from dask_isgd.storage import Dataset, RunDirectory, WeightArray, read_history, write_dataset
url = sys.argv[1]
write_dataset(url + "/d", "train", {"x": np.ones((9, 2)), "y": np.ones(9)}, inputs="x", target="y", chunk_size=4)
Dataset(url + "/d").check()
print(len(Dataset(url + "/d")), read_history(url + "/h").sizes["report"])
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert run(script, folder) == "9 0\n"

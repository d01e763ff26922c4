"""Parameters on the wire: half the bytes if asked, and never a dtype that Dask cannot carry."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL
from distributed import Client

import dask_isgd as isgd
from dask_isgd.errors import ConfigError
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.runtime import codec

WAIT = 120


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_every_dtype_comes_back_bit_by_bit(dtype):
    tensors = {"a.weight": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    packed = codec.pack(tensors)
    assert all(t.dtype is not torch.bfloat16 for t in packed.values())
    back = codec.unpack(packed)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype is dtype
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize(("asked", "size"), [(None, 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_snapshot_in_a_dtype(asked, size):
    tensors = {"w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), "n": torch.tensor(7)}
    taken = Snapshots(codec.pack).take(tensors, asked)
    assert sum(t.nbytes for t in taken.values()) == 15 * size + 8
    back = codec.unpack(taken)
    assert torch.equal(back["w"], tensors["w"].to(codec.DTYPES[asked or "float32"]))
    assert torch.equal(back["n"], tensors["n"])


def test_buffers_are_used_again_once_nobody_holds_them():
    tensors, snapshots = {"w": torch.ones(3)}, Snapshots(codec.pack)
    first = snapshots.take(tensors, "bfloat16")
    where = first["w:bfloat16"].data_ptr()
    assert snapshots.take(tensors, "bfloat16")["w:bfloat16"].data_ptr() != where
    del first
    assert snapshots.take(tensors, "bfloat16")["w:bfloat16"].data_ptr() == where


def test_an_unknown_dtype():
    with pytest.raises(ConfigError, match="publish_dtype: got 'bf16', wanted one of"):
        isgd.Learning(steps=1, publish_dtype="bf16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_is_scored_with_half_the_bytes(client: Client, digits, run_dir, dtype):
    learning = isgd.Learning(
        steps=120, batch_size=32, publish_every=20, report_every=10, evaluate_every=60, threads=1, publish_dtype=dtype
    )
    run = isgd.fit(client, MODEL, digits, run_dir, learning=learning, sampling=isgd.Sampling(gate="open"),
                   validation=digits.split("test"))  # fmt: skip
    summary = run.wait(timeout=WAIT)
    assert summary["steps"] == 120
    assert summary["validation_error"] < 0.5
    assert run.latest["examples_scored"] > 0

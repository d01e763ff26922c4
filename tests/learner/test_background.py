"""What the learner does beside its loop: buffers are not written while they are held, and errors are raised later."""

from __future__ import annotations

import threading

import pytest
import torch

from dask_isgd.errors import StorageFullError, WaitTimeoutError
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.snapshots import Snapshots


def test_a_snapshot_is_a_copy():
    tensor = torch.ones(3)
    held = Snapshots().take({"a": tensor})
    tensor += 1
    assert held["a"].tolist() == [1, 1, 1]
    assert type(held) is dict


def test_a_buffer_is_used_again_only_when_nobody_holds_the_former_copy():
    snapshots, tensor = Snapshots(), torch.zeros(1000)
    first = snapshots.take({"a": tensor})
    address = first["a"].data_ptr()
    second = snapshots.take({"a": tensor + 1})
    assert second["a"].data_ptr() != address
    assert first["a"].sum() == 0
    del first
    third = snapshots.take({"a": tensor + 2})
    assert third["a"].data_ptr() == address
    assert second["a"].sum() == 1000


def test_tensors_that_change_their_kind_get_buffers_of_their_own():
    snapshots = Snapshots()
    snapshots.take({"a": torch.zeros(3)})
    assert set(snapshots.take({"a": torch.zeros(3), "momentum": torch.ones(2)})) == {"a", "momentum"}
    assert snapshots.take({"a": torch.zeros(4)})["a"].shape == (4,)


def test_the_latest_offer_replaces_the_one_that_waits():
    background, done, gate = LatestJobWorker("test", 10).open(), [], threading.Event()
    background.offer(lambda: (gate.wait(10), done.append("first")))
    background.offer(lambda: done.append("second"))
    background.offer(lambda: done.append("third"))
    gate.set()
    background.finish()
    background.close()
    assert done[-1] == "third"
    assert "second" not in done or done == ["second", "third"]
    assert not background.busy


def test_an_error_is_raised_by_the_next_call():
    def fails() -> None:
        raise StorageFullError("no room at /somewhere")

    background = LatestJobWorker("test", 10).open()
    background.offer(fails)
    with pytest.raises(StorageFullError, match="/somewhere"):
        background.finish()
    background.finish()
    background.close()


def test_every_wait_has_a_timeout():
    gate = threading.Event()
    background = LatestJobWorker("the store", 0.05).open()
    background.offer(gate.wait)
    with pytest.raises(WaitTimeoutError, match=r"the store: not done within 0\.05 s"):
        background.finish()
    gate.set()
    background.close()

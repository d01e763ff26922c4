"""Scoring tasks of a worker overlap; each ends after its own write, and with its own error."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from distributed import Client, Future, LocalCluster, Reschedule, Worker, get_worker
from numpy.testing import assert_array_equal
from torch import nn

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import CorruptChunkError, LeaseLostError
from dask_isgd.runtime import torch_threads
from dask_isgd.runtime.dask_internals import task_status
from dask_isgd.runtime.placement import ScorerPool
from dask_isgd.scorer import scoring_threads
from dask_isgd.scorer import task as module
from dask_isgd.storage import Dataset, WeightArray, write_dataset

WAIT = 30
ROWS, CHUNKS = 64, 6


@pytest.fixture(scope="module", params=[1, 2], ids=["one place", "two places"])
def places(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def client(places) -> Iterator[Client]:
    """A client of one scorer in this process, whose store the tests can slow down."""
    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "protocol": "tcp://"}
    with (
        LocalCluster(n_workers=1, threads_per_worker=places, resources={"scorer": places}, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


class Stages:
    """What the tasks do, in order; a stage begins once those that it is made to wait for have."""

    def __init__(self) -> None:
        self.order: list[tuple[str, int]] = []
        self.begun: dict[tuple[str, int], threading.Event] = defaultdict(threading.Event)
        self.after: dict[tuple[str, int], tuple[str, int]] = {}
        """A stage ends after another one, of another task, has begun."""
        self.errors: dict[tuple[str, int], Exception] = {}
        self.late: list[tuple[str, int]] = []
        self._lock = threading.Lock()

    def enter(self, stage: str, chunk: int) -> None:
        with self._lock:
            self.order.append((stage, chunk))
        self.begun[stage, chunk].set()
        other = self.after.get((stage, chunk))
        if other is not None and not self.begun[other].wait(WAIT):
            self.late.append(other)
        if (stage, chunk) in self.errors:
            raise self.errors[stage, chunk]


@pytest.fixture
def stages(monkeypatch) -> Iterator[Stages]:
    """Stages of the tasks: an example's first input is the number of its chunk."""
    found = Stages()
    read, write, norms = Dataset.read, WeightArray.write, module._Replica.norms

    def watched_read(self, start, stop):
        if threading.current_thread().name.startswith("isgd-reader"):  # no check of the data
            found.enter("read", start // ROWS)
        return read(self, start, stop)

    def watched_norms(self, inputs, targets):
        chunk = int(inputs[0][0, 0])
        found.enter("score", chunk)
        result = norms(self, inputs, targets)
        found.enter("scored", chunk)
        return result

    def watched_write(self, chunk, weights):
        found.enter("write", chunk)
        write(self, chunk, weights)
        found.enter("written", chunk)

    monkeypatch.setattr(Dataset, "read", watched_read)
    monkeypatch.setattr(module._Replica, "norms", watched_norms)
    monkeypatch.setattr(WeightArray, "write", watched_write)
    yield found
    for event in list(found.begun.values()):
        event.set()


def linear() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.fixture
def make(tmp_path) -> Callable[..., RunSpec]:
    def spec(synchronous: bool = False) -> RunSpec:
        rng = np.random.default_rng(0)
        x = np.stack([np.repeat(np.arange(CHUNKS), ROWS), rng.normal(size=CHUNKS * ROWS)], 1).astype("f4")
        y = rng.integers(0, 2, len(x))
        write_dataset(tmp_path / "d", "train", {"x": x, "y": y}, inputs="x", target="y", chunk_size=ROWS)
        learning = isgd.Learning(steps=1, synchronous=synchronous)
        scoring = isgd.Scoring(chunk_size=ROWS, cache_memory=0)
        plan = prepare(
            RunRequest(model=linear, data=tmp_path / "d", run_dir=tmp_path / "run", learning=learning, scoring=scoring)
        )
        create(plan)
        return plan.spec

    return spec


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return dict(models.state_of(models.build(linear, 0)))


@pytest.fixture
def submit(client, make, tensors) -> Callable[..., list[Future]]:
    """Submits scoring tasks of chunks as the coordinator does."""

    def submitted(spec: RunSpec, *chunks: int) -> list[Future]:
        return [
            client.submit(module.score, tensors, spec, chunk, 1, 0, pure=False, priority=-chunk, **placement)
            for chunk in chunks
        ]

    placement = ScorerPool(client, isgd.Scoring()).placement()
    return submitted


def test_the_next_chunk_is_read_and_the_last_one_written_while_one_is_scored(places, make, submit, stages):
    """Chunks are scored ``places`` at a time; each waits for the read of one that has no place yet, and so on."""
    for chunk in range(CHUNKS - places):
        stages.after["scored", chunk] = "read", chunk + places
        stages.after["write", chunk] = "score", chunk + places
    futures = submit(make(), *range(CHUNKS))
    reports = [future.result(timeout=2 * WAIT) for future in futures]
    assert not stages.late, "these did not begin meanwhile"
    assert [report.chunk for report in reports] == list(range(CHUNKS))


def test_one_chunk_per_place_is_read_ahead(places, make, submit, stages):
    spec = make()
    stages.after = {("score", chunk): ("test", 0) for chunk in range(places)}
    futures = submit(spec, *range(CHUNKS))
    for chunk in range(places):
        assert stages.begun["read", places + chunk].wait(WAIT)
    ahead = [chunk for stage, chunk in stages.order if stage == "read"]
    assert sorted(ahead) == list(range(2 * places))
    stages.begun["test", 0].set()
    for future in futures:
        future.result(timeout=WAIT)
    busy = most = 0
    for stage, _ in stages.order:
        busy += (stage == "score") - (stage == "scored")
        most = max(most, busy)
    assert most == places


def test_a_task_ends_after_its_write_and_with_the_error_of_its_own(places, make, submit, stages):
    failed, slow, last = 0, 1, places + 1
    spec = make()
    stages.after["write", failed] = "score", places
    stages.errors["write", failed] = OSError("the store is away")
    stages.after["write", slow] = "test", 0
    futures = submit(spec, *range(last + 1))
    assert futures[last].result(timeout=2 * WAIT).chunk == last, "it is not held up"
    with pytest.raises(OSError, match="the store is away"):
        futures[failed].result(timeout=WAIT)
    assert not futures[slow].done()
    assert np.isnan(spec.directory.open_weights().read(slow)).all()
    stages.begun["test", 0].set()
    assert futures[slow].result(timeout=WAIT).chunk == slow
    written = [chunk for chunk in range(last + 1) if np.isfinite(spec.directory.open_weights().read(chunk)).all()]
    assert written == list(range(1, last + 1))


def test_a_bad_read_is_the_error_of_its_task(places, make, submit, stages):
    stages.after["scored", 0] = "read", places
    stages.errors["read", places] = CorruptChunkError("chunk is corrupt")
    futures = submit(make(), *range(places + 2))
    with pytest.raises(CorruptChunkError, match="chunk is corrupt"):
        futures[places].result(timeout=WAIT)
    for chunk in (*range(places), places + 1):
        assert futures[chunk].result(timeout=WAIT).chunk == chunk


def status_of(key: str, dask_worker: Worker) -> str:
    return task_status(dask_worker, key)


def test_a_task_that_is_cancelled_before_its_turn_is_not_scored(client, places, make, submit, stages):
    spec, last = make(), places + 1
    stages.after = {("scored", chunk): ("test", 0) for chunk in range(places)}
    futures = submit(spec, *range(last + 1))
    assert stages.begun["read", places].wait(WAIT)
    futures[places].cancel()
    deadline = time.monotonic() + WAIT
    while list(client.run(status_of, futures[places].key).values()) != ["cancelled"]:
        assert time.monotonic() < deadline
    stages.begun["test", 0].set()
    for chunk in (*range(places), last):
        assert futures[chunk].result(timeout=WAIT).chunk == chunk
    assert ("score", places) not in stages.order
    assert np.isnan(spec.directory.open_weights().read(places)).all()


@pytest.mark.parametrize("error", [CancelledError("gone"), Reschedule()], ids=["cancelled", "its worker leaves"])
def test_a_task_that_waits_for_its_turn_ends_as_soon_as_it_is_not_wanted(error):
    threads, busy, computed = scoring_threads.ScoringThreads(1), threading.Event(), []

    def require_wanted() -> None:
        raise error

    before = threading.Thread(target=threads.run, args=(busy.wait, lambda: None, lambda: None))
    before.start()
    with pytest.raises(type(error)):
        threads.run(lambda: computed.append(1), lambda: computed.append(2), require_wanted)
    busy.set()
    before.join(WAIT)
    assert computed == []


def test_a_lease_lost_while_a_chunk_is_scored_or_read_ahead_fences_its_write(places, make, submit, stages):
    spec = make(synchronous=True)
    leases = spec.directory.leases("learner")
    leases.acquire({})
    stages.after = {("scored", chunk): ("test", 0) for chunk in range(places)}
    futures = submit(spec, *range(2 * places))
    for chunk in range(places, 2 * places):
        assert stages.begun["read", chunk].wait(WAIT)
    leases.acquire({})
    stages.begun["test", 0].set()
    for future in futures:
        with pytest.raises(LeaseLostError, match="incarnation 1 is fenced"):
            future.result(timeout=WAIT)
    assert np.isnan(spec.directory.open_weights().read_all()).all()


def test_the_weights_have_the_bits_of_tasks_one_by_one(client, make, submit, tensors):
    spec = make(synchronous=True)
    spec.directory.leases("learner").acquire({})
    for future in submit(spec, *range(CHUNKS)):
        future.result(timeout=WAIT)
    together = spec.directory.open_weights().read_all()
    spec.directory.open_weights().write(0, np.zeros(ROWS))
    for chunk in range(CHUNKS):
        module.score(tensors, spec, chunk, 1, 0)
    assert_array_equal(spec.directory.open_weights().read_all(), together)
    assert np.isfinite(together).all()


def test_a_learner_in_the_same_worker_keeps_a_thread(client, places):
    def count() -> int:
        return scoring_threads._threads_of(get_worker(), None).count

    assert client.submit(count, pure=False).result(timeout=WAIT) == places
    with torch_threads.LearnerThreads(torch.get_num_threads()):
        assert client.submit(count, pure=False).result(timeout=WAIT) == 1

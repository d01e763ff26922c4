"""Faults 5, 6, 7, 12 and 13: what fails for good says so as itself, what can be made good is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dask.config
import numpy as np
import pytest
import torch
from harness import (
    MODEL,
    OPEN,
    WAIT,
    committed,
    fit,
    holder,
    kill,
    learning,
    lowest_step,
    no_gaps,
    reaches,
    saved,
    trained,
    until,
)

import dask_isgd as isgd
from dask_isgd.core.spec import topic_of
from dask_isgd.errors import (
    ClusterMismatchError,
    ConfigError,
    CorruptChunkError,
    NoLearnerWorkerError,
    NonFiniteLossError,
    StorageFullError,
)
from dask_isgd.events import Published
from dask_isgd.pipelines import PIPELINES
from dask_isgd.runtime import pubsub
from dask_isgd.storage import Dataset, WeightArray, write_dataset

pytestmark = pytest.mark.cluster


def test_a_loss_that_is_not_finite_arrives_as_itself_and_nothing_of_it_is_kept(client, digits, run_dir):
    wild = learning(steps=10_000, learning_rate=1e18, clip_mean_factor=None, checkpoint_steps=1)
    run = fit(client, digits, run_dir, learning=wild, sampling=isgd.Sampling(uniform=True))
    with pytest.raises(NonFiniteLossError, match=r"step \d+: .*indices \["):
        run.wait(timeout=WAIT)
    assert run.status == "failed"
    found = run.directory.checkpoints().latest()
    assert found is None or all(np.isfinite(a).all() for n, a in found.tensors.items() if n.startswith("model."))
    # a publication on its way when the learner failed may be heard after its end
    late = Published(run=run.id, incarnation=1, version=0, address="", checkpoint=None)
    pubsub.announce(client, f"isgd-{run.id}", late)
    other = isgd.attach(client, run_dir)  # nothing but the events tell this one
    with pytest.raises(NonFiniteLossError, match=r"step \d+"):
        other.wait(timeout=WAIT)


class BreaksLater:
    """Losses that are not finite from a call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        losses = torch.nn.functional.cross_entropy(output, target, reduction="none")
        return losses * float("nan") if self.calls > 500 else losses


def test_the_history_of_a_run_that_fails_goes_up_to_its_failure(client, digits, run_dir):
    settings = learning(report_every=1, checkpoint_steps=None)
    run = fit(client, digits, run_dir, loss=BreaksLater(), learning=settings, sampling=isgd.Sampling(uniform=True))
    with pytest.raises(NonFiniteLossError) as failure:
        run.wait(timeout=WAIT)
    (step,) = re.findall(r"step (\d+)", str(failure.value))
    assert int(run.history.step[-1]) == int(step)


def limit(size: int) -> None:
    """The largest file this process may write, in bytes: a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(client, digits, run_dir):
    run = fit(client, digits, run_dir)
    until(run, saved(run))
    worker = [holder(run)["address"]]
    client.run(limit, 4096, workers=worker)
    try:
        with pytest.raises(StorageFullError, match=str(run_dir)):
            run.wait(timeout=WAIT)
    finally:
        client.run(limit, -1, workers=worker)
    kept = committed(run)
    assert kept >= 50
    again = fit(client, digits, run_dir, resume=True, learning=learning(steps=kept + 50))
    again.wait(timeout=WAIT)
    no_gaps(again)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "isgd", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"only root may mount a file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    """Refused while a file is open for writing: they are, for a moment each."""
    deadline = time.monotonic() + WAIT
    while subprocess.run(["mount", "-o", f"remount,{how}", str(place)], capture_output=True).returncode:
        assert time.monotonic() < deadline


def fill(place: Path) -> None:
    """Leave no room."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


@pytest.mark.parametrize(
    ("spoil", "mend", "says", "refused"),
    [
        (fill, lambda place: (place / "filler").unlink(), "no space is left", StorageFullError),
        (lambda place: remount(place, "ro"), lambda place: remount(place, "rw"), "read-only", ConfigError),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_no_more_is_named_and_the_run_goes_on_once_it_does(
    client, digits, small_disk, spoil, mend, says, refused
):
    run_dir = small_disk / "run"
    run = fit(client, digits, run_dir)
    until(run, saved(run))
    kept = committed(run)
    spoil(small_disk)
    with pytest.raises(StorageFullError, match=f"cannot write {run_dir}.*{says}.*Everything committed is intact"):
        run.wait(timeout=WAIT)
    found = run.directory.checkpoints().latest()
    assert found is not None
    assert found.step >= kept >= 50
    with pytest.raises(refused, match=f"(?i){says}"):
        fit(client, digits, small_disk / "another")
    mend(small_disk)
    again = fit(client, digits, run_dir, resume=True, learning=learning(steps=found.step + 50))
    again.wait(timeout=WAIT)
    assert lowest_step(again, again.directory.leases().highest()) == found.step
    no_gaps(again)


@pytest.fixture
def damaged(digits, tmp_path) -> Dataset:
    """The digits with a chunk cut short, and another one lost."""
    shutil.copytree(str(digits.url).removesuffix("/train"), tmp_path / "damaged.zarr")
    chunks = tmp_path / "damaged.zarr" / "train" / "image" / "c"
    (chunks / "3" / "0" / "0").write_bytes(b"abc")
    (chunks / "7" / "0" / "0").unlink()
    return Dataset(tmp_path / "damaged.zarr", group="train")


def test_a_chunk_that_cannot_be_read_ends_the_run_by_its_name(client, damaged, run_dir):
    run = fit(client, damaged, run_dir)
    with pytest.raises(CorruptChunkError, match="image', chunk 3"):
        run.wait(timeout=WAIT)


def test_a_run_that_is_told_to_goes_on_without_bad_chunks_and_says_so(client, damaged, run_dir):
    settings = learning(steps=300)
    run = fit(client, damaged, run_dir, learning=settings, scoring=isgd.Scoring(skip_bad_chunks=True))
    run.wait(timeout=WAIT)
    weights = WeightArray.open(run.directory.weights)
    size = damaged.chunk_size
    bad = {start // weights.chunk_size for start in (3 * size, 7 * size)}
    for chunk in range(weights.n_chunks):
        assert np.isfinite(weights.read(chunk)).all() == (chunk not in bad)
    faults = [e for _, e in client.get_events(topic_of(run.id)) if e["kind"] == "fault"]
    said = [e["detail"] for e in faults if e["what"] == "data"]
    assert {int(re.match(r"scoring chunk (\d+) is left out", detail)[1]) for detail in said} == bad
    assert {int(re.match(r"chunk (\d+): ", e["detail"])[1]) for e in faults if e["what"] == "score"} == bad
    assert float(run.history.loss[-1]) < 0.5
    no_gaps(run)


def hear_nothing(yes: bool) -> None:
    """Every event is lost on its way to the tasks of this process."""
    from dask_isgd.runtime import pubsub

    fan = pubsub._Handler
    if yes:
        fan.heard = fan.__call__
        fan.__call__ = lambda self, event: fan.heard(self, event) if event[1].get("kind") == "echo" else None
    else:
        fan.__call__ = fan.heard


def test_events_that_are_lost_lose_nothing(client, digits, run_dir):
    client.run(hear_nothing, True)
    try:
        run = fit(client, digits, run_dir, learning=learning(steps=20, synchronous=True))
        run.wait(timeout=WAIT)
    finally:
        client.run(hear_nothing, False)
    weights = WeightArray.open(run.directory.weights)
    assert (weights.read_stamps()[:, 0] == 0).all()
    assert np.isfinite(weights.read_all()).all()


def test_weights_that_were_damaged_on_disk_are_scored_anew(client, digits, run_dir):
    """Weights can be made again: a run is not lost with them."""
    run = fit(client, digits, run_dir)
    weights = WeightArray.open(run.directory.weights)
    until(run, lambda latest: np.isfinite(weights.read_all()).all())
    assert run.stop(timeout=WAIT) == "stopped"
    path = Path(run.directory.weights) / "weight" / "c" / "1"
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 16
    path.write_bytes(damaged)
    again = fit(client, digits, run_dir, resume=True)
    until(again, lambda latest: np.isfinite(weights.read_all()).all())
    until(again, reaches(again.latest["step"] + 50, incarnation=2))
    assert again.stop(timeout=WAIT) == "stopped"
    assert again.directory.leases().highest() == 2, "the learner did not fail on the way"
    no_gaps(again)


def test_a_killed_scorer_costs_its_scores_in_flight(client, digits, run_dir):
    run = fit(client, digits, run_dir)
    until(run, lambda latest: latest.get("examples_scored", 0) > 0)
    scorer = next(a for a in client.scheduler_info()["workers"] if a != holder(run)["address"])
    kill(client.run(_pid, workers=[scorer])[scorer])
    until(run, reaches(run.latest["step"] + 100))
    weights = WeightArray.open(run.directory.weights)
    until(run, lambda latest: np.isfinite(weights.read_all()).all())
    assert run.stop(timeout=WAIT) == "stopped"
    assert run.directory.leases().highest() == 1
    no_gaps(run)


def _pid() -> int:
    import os

    return os.getpid()


def test_a_version_lost_with_its_holder_is_made_good_by_the_next(client, digits, run_dir):
    run = fit(client, digits, run_dir)
    until(run, reaches(60))
    kill(holder(run)["pid"])
    weights = WeightArray.open(run.directory.weights)
    until(run, lambda latest: (weights.read_stamps()[:, 1] == 2).all())
    heard = [e for _, e in client.get_events(topic_of(run.id)) if e["kind"] == "scored"]
    assert heard
    assert run.stop(timeout=WAIT) == "stopped"


def test_without_a_worker_for_the_learner_the_wait_ends_and_the_run_goes_on_when_one_is_added(
    client, digits, run_dir, capsys
):
    run = fit(client, digits, run_dir)
    until(run, reaches(100))
    with dask.config.set({"isgd.cluster.timeout": "1s", "distributed.deploy.lost-worker-timeout": "12s"}):
        watcher = isgd.attach(client, run_dir)
        until(watcher, reaches(100))
        client.retire_workers([holder(run)["address"]])
        with pytest.raises(NoLearnerWorkerError, match=r"--resources 'learner=1'.*resumes from its latest checkpoint"):
            watcher.wait(timeout=WAIT)
        seconds = until(run, reaches(1, incarnation=2))
    with capsys.disabled():
        print(f"\nlearner's worker retired: trains {seconds:.1f} s after the user was told, on a worker that was added")
    assert trained(run, 1) <= lowest_step(run, 2) < trained(run, 1) + 10  # reports come every 10 steps
    published = [e["incarnation"] for _, e in client.get_events(topic_of(run.id)) if e["kind"] == "published"]
    assert published == sorted(published)
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)


def test_one_example_is_enough_to_train_on(client, run_dir, tmp_path):
    arrays = {"image": np.ones((1, 8, 8), "f4"), "label": np.array([3])}
    write_dataset(str(tmp_path / "one.zarr"), "train", arrays, inputs="image", target="label", chunk_size=4, classes=10)
    run = fit(client, Dataset(tmp_path / "one.zarr", group="train"), run_dir, learning=learning(steps=60))
    assert run.wait(timeout=WAIT)["steps"] == 60
    assert float(run.history.loss[-1]) < float(run.history.loss[0])
    assert (run.history.largest_coefficient == 1).all()


@pytest.mark.parametrize("what", ["data", "run directory"])
def test_what_workers_do_not_see_is_named_with_the_worker(client, digits, run_dir, what):
    """The memory of this process and its open folders are places that no other process sees."""
    folder = os.open(run_dir.parent, os.O_RDONLY)
    high = fcntl.fcntl(folder, fcntl.F_DUPFD, 900)
    try:
        here, data = f"/proc/self/fd/{high}", digits
        if what == "data":
            here = f"memory://{run_dir.parent.name}"
            data = Dataset(PIPELINES["digits"].prepare(f"{here}/digits.zarr"), group="train")
        with pytest.raises(ClusterMismatchError, match=rf"tcp://.*: {what}.* {here}"):
            fit(client, data, run_dir if what == "data" else f"{here}/run")
    finally:
        os.close(folder)
        os.close(high)
    if what == "data":
        assert not run_dir.exists()


def installed(version: str | None) -> None:
    """Pretend to a version of zarr in this process, or end the pretence."""
    from importlib import metadata

    if version is None:
        metadata.version = metadata._version
    else:
        metadata._version = metadata.version
        metadata.version = lambda name: version if name == "zarr" else metadata._version(name)


def test_another_version_is_named_with_the_worker(client, digits, run_dir):
    worker = next(iter(client.scheduler_info()["workers"]))
    client.run(installed, "2.18.0", workers=[worker])
    try:
        with pytest.raises(ClusterMismatchError, match=rf"{worker}: zarr is 2\.18\.0, the client has "):
            fit(client, digits, run_dir)
    finally:
        client.run(installed, None, workers=[worker])
    assert not run_dir.exists()


def test_a_model_that_workers_cannot_import_is_named_with_the_worker(client, digits, run_dir, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("from dask_isgd.pipelines.models import digits\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ClusterMismatchError, match=r"tcp://.*: model only_here:digits: .*only_here"):
        isgd.fit(client, "only_here:digits", digits, run_dir, learning=learning())
    assert not run_dir.exists()
    sys.modules.pop("only_here", None)


def test_resources_that_no_worker_declares(client, digits, run_dir):
    with pytest.raises(ConfigError, match=r"got \{'gpu': 2\}.*the workers declare learner=1, scorer=1"):
        fit(client, digits, run_dir, scoring=isgd.Scoring(resources={"gpu": 2}))
    assert not run_dir.exists()


def test_a_model_of_another_shape_of_loss_never_starts(client, digits, run_dir):
    with pytest.raises(isgd.errors.ModelError, match=r"one .*loss per example"):
        isgd.fit(
            client, MODEL, digits, run_dir, loss=torch.nn.functional.cross_entropy, learning=learning(), sampling=OPEN
        )
    assert not run_dir.exists()

"""Several runs on one cluster at once share the scorers; one fails, the others go on."""

from __future__ import annotations

import collections
import time

import pytest
import torch
from conftest import MODEL
from distributed import Client

import dask_isgd as isgd
from dask_isgd.errors import NonFiniteLossError
from dask_isgd.events import Sharing
from dask_isgd.pubsub import announce
from dask_isgd.sharing import TOPIC, Neighbours, part

WAIT = 120
CHUNK = 64


@pytest.mark.parametrize(
    ("room", "runs", "parts"),
    [
        (8, "a", [8]),
        (8, "ab", [4, 4]),
        (8, "abc", [3, 3, 2]),
        (2, "abc", [1, 1, 1]),  # nobody starves: they are served in turn
        (0, "ab", [0, 0]),
    ],
)
def test_parts(room, runs, parts):
    assert [part(room, run, set(runs)) for run in runs] == parts
    assert [part(room, run, set(runs) - {run}) for run in runs] == parts, "whether or not it hears itself"


def test_who_falls_silent_is_left_out(client: Client):
    now = 0.0
    mine = Neighbours(client, client, "b", clock=lambda: now)
    try:
        assert mine.share(8) == 8
        announce(client, TOPIC, Sharing(run="a", incarnation=0))
        deadline = time.monotonic() + WAIT
        while mine.share(8) != 4:
            assert time.monotonic() < deadline
        now = 4.9
        assert mine.share(8) == 4
        now = 5.1
        assert mine.share(8) == 8
    finally:
        mine.close()


def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that is NaN once the model has learned a little."""
    loss = torch.nn.functional.cross_entropy(output, target, reduction="none")
    return loss * torch.where(loss.mean() < 1.0, torch.nan, 1.0)


def test_three_runs_share_the_scorers_and_the_failure_of_one_is_its_own(digits, tmp_path):
    learning = isgd.Learning(
        steps=1_000_000, batch_size=32, publish_every=10, report_every=10, learning_rate=0.05, threads=1
    )
    sampling = isgd.Sampling(gate="open")
    assert digits.chunk_size == CHUNK, "what a scoring task scores, at the least"
    with isgd.LocalCluster(4, learners=3) as cluster, cluster.get_client() as client:
        runs = [
            isgd.fit(client, MODEL, digits, tmp_path / name, learning=learning, sampling=sampling, loss=loss)
            for name, loss in (("a", None), ("b", None), ("failing", broken))
        ]
        with pytest.raises(NonFiniteLossError):
            runs[2].wait(timeout=WAIT)
        assert runs[2].status == "failed"
        client.get_task_stream(count=1)
        scored = {run.name: run.latest.get("scored_examples", 0) for run in runs}
        deadline = time.monotonic() + WAIT
        while min(run.latest.get("scored_examples", 0) - scored[run.name] for run in runs[:2]) < 20 * CHUNK:
            assert time.monotonic() < deadline
            assert [run.status for run in runs[:2]] == ["running", "running"]
            time.sleep(0.1)
        tasks = collections.Counter(
            str(record["key"]).split("'")[1] for record in client.get_task_stream(count=100_000)
        )
        first, second = (tasks[f"score-{run.name}"] for run in runs[:2])
        assert 0.6 < first / second < 1.7, "equal parts of one scorer"
        assert [run.stop(timeout=WAIT) for run in runs[:2]] == ["stopped", "stopped"]
        assert len({run.latest["learner"] for run in runs}) == 3, "a learner's worker each"

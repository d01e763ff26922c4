"""Three runs on one cluster at once; one fails, the others go on.

In a file of its own: its cluster's client must not be opened inside another's.
"""

from __future__ import annotations

import collections
import time

import pytest
import torch
from conftest import MODEL

import dask_isgd as isgd
from dask_isgd.errors import NonFiniteLossError

pytestmark = pytest.mark.cluster

WAIT = 120
CHUNK = 64


def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that is NaN once the model has learned a little."""
    loss = torch.nn.functional.cross_entropy(output, target, reduction="none")
    return loss * torch.where(loss.mean() < 1.0, torch.nan, 1.0)


def test_three_runs_share_the_scorers_and_the_failure_of_one_is_its_own(digits, tmp_path):
    learning = isgd.Learning(
        steps=1_000_000, batch_size=32, publish_every=1, report_every=10, learning_rate=0.05, threads=1
    )  # each step is published: otherwise a run has nothing to score while its learner is slow, and no share to take
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
        for chunks in (20, 200):  # both score by now; and long enough for their parts to show
            client.get_task_stream(count=1)
            began = time.time()
            for run in runs[:2]:
                enough = run.latest.get("examples_scored", 0) + chunks * CHUNK
                assert any(latest.get("examples_scored", 0) >= enough for latest in run.watch(WAIT))
        assert [run.status for run in runs[:2]] == ["running", "running"]
        tasks = collections.Counter(
            str(record["key"]).split("'")[1] for record in client.get_task_stream(start=began, count=100_000)
        )
        first, second = (tasks[f"score-{run.id}"] for run in runs[:2])
        assert 0.6 < first / second < 1.7, "equal parts of one scorer"
        assert [run.stop(timeout=WAIT) for run in runs[:2]] == ["stopped", "stopped"]
        assert len({run.latest["learner"] for run in runs}) == 3, "a learner's worker each"

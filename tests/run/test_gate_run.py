"""While importance sampling does not pay, scorers are left in peace; the run is uniform SGD."""

from __future__ import annotations

import os
from typing import Any

import dask
import numpy as np
import torch
from distributed import Client
from torch import nn

import dask_isgd as isgd
from dask_isgd.storage import Dataset, write_dataset

WAIT = 240
ROWS, CHUNK = 4096, 64
DRAINED = 2.0
"""Seconds after which what was in flight as the gate closed has landed and been told."""


def linear() -> nn.Module:
    return nn.Linear(8, 1, bias=False)


def equal_gradients(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The gradient of each loss is its own input: all norms are equal, whatever the parameters."""
    return output.squeeze(1) * target


def threads_of_the_learner(client: Client) -> tuple[int, int]:
    def read() -> tuple[int, int]:
        return dask.config.get("isgd.cluster.learner-threads"), dask.config.get("isgd.cluster.spare-threads")

    workers = client.scheduler_info(n_workers=-1)["workers"]
    address = next(a for a, w in workers.items() if "learner" in w["resources"])
    return client.run(read, workers=[address])[address]


def heard(client: Client, run: isgd.Run, kind: str) -> list[tuple[float, dict[str, Any]]]:
    """What the run has said of one kind so far, and when."""
    return [(time, event) for time, event in client.get_events(f"isgd-{run.id}") if event["kind"] == kind]


def test_equal_norms_keep_the_gate_shut_and_the_scorers_idle(client: Client, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], (ROWS, 8)).astype(np.float32)
    url = str(tmp_path / "equal.zarr")
    arrays = {"x": x, "y": rng.choice([-1.0, 1.0], ROWS).astype(np.float32)}
    write_dataset(url, "train", arrays, inputs=["x"], target="y", chunk_size=CHUNK)
    run = isgd.fit(
        client,
        linear,
        Dataset(url, group="train"),
        tmp_path / "run",
        loss=equal_gradients,
        learning=isgd.Learning(steps=10**7, batch_size=32, report_every=10, publish_every=20),
        scoring=isgd.Scoring(chunk_size=CHUNK),
    )
    concluded, chunks = None, []
    for _ in run.watch(WAIT):  # a probe takes a twentieth of the time: how soon it follows depends on its own
        concluded = concluded or next((time for time, e in heard(client, run, "progress") if e["probing"]), None)
        if concluded is not None:
            late = [event for time, event in heard(client, run, "scored") if time > concluded + DRAINED]
            chunks = [chunk for event in late for chunk, _, _ in event["chunks"]][: ROWS // CHUNK]
        if len(chunks) >= 8:
            break
    run.stop(timeout=WAIT)
    history = run.history
    assert float(history.gate.max()) == 0
    np.testing.assert_allclose(history.gain, 1.0)
    own, spare = threads_of_the_learner(client)
    assert spare == (os.cpu_count() or 1) - own
    assert history.threads[0] == own
    # how many it takes while the gate is closed depends on the machine's load: tests/runtime/test_torch_threads.py
    assert set(np.unique(history.threads)) <= {*range(1, own + spare + 1)}
    known = history.candidate_gain.dropna("report")  # none before the first scores, nor right after the gate's decision
    assert len(known) > 40
    np.testing.assert_allclose(known[20:], 1.0, atol=1e-3)
    assert len(chunks) >= 8, "a closed gate continues probing"
    assert len(set(chunks)) == len(chunks), "and the probe moves: no chunk has a second turn before all others"

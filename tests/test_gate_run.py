"""While importance sampling does not pay, scorers are left in peace; the run is uniform SGD."""

from __future__ import annotations

import os

import dask
import numpy as np
import torch
from distributed import Client
from torch import nn

import dask_isgd as isgd
from dask_isgd.sampling import probe_chunks
from dask_isgd.storage import Dataset, write_dataset

WAIT = 240
ROWS, CHUNK = 4096, 64


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
        learning=isgd.Learning(steps=1500, batch_size=32, report_every=10, publish_every=20),
        scoring=isgd.Scoring(chunk=CHUNK),
    )
    run.wait(timeout=WAIT)
    history = run.history
    assert float(history.gate.max()) == 0
    np.testing.assert_allclose(history.gain, 1.0)
    own, spare = threads_of_the_learner(client)
    assert spare == (os.cpu_count() or 1) - own
    assert history.threads[0] == own
    assert history.threads[-1] == own + spare, "the learner takes what a closed gate leaves idle"
    np.testing.assert_allclose(history.candidate_gain[20:], 1.0, atol=1e-3)
    scored = [
        (chunk, version)
        for _, event in client.get_events(f"isgd-{run.name}")
        if event["kind"] == "scored"
        for chunk, _, version in event["chunks"]
    ]
    late = [chunk for chunk, version in scored if version > 1000]
    assert set(late) <= set(probe_chunks(ROWS // CHUNK))

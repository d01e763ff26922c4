"""How the learner reads weights: those of an earlier incarnation, and rewritten chunks."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dask_isgd.config import Learning, Sampling
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import CorruptChunkError, RunNotFoundError
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.step import Learned, Step
from dask_isgd.learner.trainer import Trainer
from dask_isgd.learner.weight_reader import WeightReader
from dask_isgd.sampling import ImportanceSampler
from dask_isgd.scorer.task import _keep_former
from dask_isgd.storage import WeightArray

WAIT = 30
CHUNK = 300


@pytest.fixture
def weights(tmp_path: Path) -> WeightArray:
    """Three chunks of ones, the middle one damaged."""
    array = WeightArray.create(tmp_path / "weights.zarr", 3 * CHUNK, CHUNK)
    for chunk in range(3):
        array.write(chunk, np.ones(CHUNK))
    path = tmp_path / "weights.zarr" / "weight" / "c" / "1"
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 16
    path.write_bytes(damaged)
    return array


def test_a_damaged_chunk_is_passed_over(weights, caplog):
    with caplog.at_level(logging.WARNING):
        reader = WeightReader(weights, WAIT, strict=False).open()
        for chunk in range(3):
            reader.request(chunk, 7)
        reader.close()
    taken = [reader.get(), reader.get()]
    assert [(item[0], item[2]) for item in taken] == [(0, 7), (2, 7)]
    assert reader.get() is None
    assert "chunk 1" in caplog.text


def test_an_exact_run_takes_none_for_another(weights):
    reader = WeightReader(weights, WAIT, strict=True).open()
    reader.request(1, 7)
    with pytest.raises(CorruptChunkError, match="chunk 1"):
        reader.get(timeout=WAIT)
    reader.close()


@pytest.mark.parametrize("strict", [False, True])
def test_a_chunk_whose_file_is_not_visible_yet_is_read_once_it_is(weights, caplog, strict):
    """As on a network file system that remembers for a while that there was no such file."""
    path = Path(weights.url) / "weight" / "c" / "2"
    path.rename(path.with_name("hidden"))
    reader = WeightReader(weights, WAIT, strict=strict).open()
    reader.request(2, 7)
    reader.request(0, 7)
    assert reader.get(timeout=WAIT)[0] == 0
    assert reader.get(timeout=0.05) is None
    path.with_name("hidden").rename(path)
    chunk, values, version = reader.get(timeout=WAIT)
    assert (chunk, version, values.tolist()) == (2, 7, [1.0] * CHUNK)
    reader.close()
    assert "chunk 2 are not visible on this host yet" in caplog.text


def test_a_deleted_run_directory_is_named(weights):
    reader = WeightReader(weights, WAIT, strict=False).open()
    shutil.rmtree(weights.url)
    reader.request(0, 7)
    with pytest.raises(RunNotFoundError, match="the run directory was deleted or moved while the run was training"):
        reader.get(timeout=WAIT)
    reader.close()


def test_a_bad_norm_has_no_former_weight_in_a_damaged_chunk(weights):
    norms = {chunk: np.full(CHUNK, 2.0, np.float32) for chunk in (0, 1)}
    for chunk, values in norms.items():
        values[4] = np.inf
        assert _keep_former(values, weights, chunk, 0, strict=False) == 1
    assert norms[0][4] == 1
    assert np.isnan(norms[1][4])
    with pytest.raises(CorruptChunkError):
        _keep_former(np.array([np.nan], np.float32), weights, 1, CHUNK, strict=True)


def test_what_scoring_lets_pass_the_sampler_takes():
    """One bad norm, in a chunk of ten never scored before."""
    norms = np.ones(10, np.float32)
    norms[3] = np.nan
    sampler = ImportanceSampler(10, 10, Sampling())
    assert sampler.update(0, norms, 1) == 1
    assert np.isfinite(sampler.probabilities()).all()


@pytest.mark.parametrize(("ahead", "seen"), [(4, False), (200, True)])
def test_the_gate_judges_the_current_proposal_though_minibatches_are_drawn_long_ahead(ahead, seen):
    """A minibatch drawn by nearly equal weights; those of a tenth with large norms, a gain of 8, came after it."""
    n, norms = 400, np.where(np.arange(400) % 10, 0.1, 10.0)
    sampling = Sampling(gate="open", smoothing=0.0, ema_decay=0.0, scheme="independent")
    sampler = BatchSampler(n, n, 64, sampling, seed=0, report_every=10)
    sampler.update(0, np.where(np.arange(n) % 2, 1.0, 1.001).astype("f4"), 0)
    drawn = sampler.draw(0)
    sampler.update(0, norms.astype("f4"), 1)
    sampler.draw(ahead)
    sampler.learned(0, drawn, Step(1.0, norms[drawn.indices], 0.1, 1.0, False), measure=True)
    assert (sampler.report(1)["candidate_gain"] > 4) == seen


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (LastState, "no rule for LSTM"),
        (lambda: torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(15, 2)), backend="eager"), "compiled"),
    ],
)
def test_a_model_without_norms_in_its_steps_is_reported_once_and_in_the_history(make, why, caplog):
    """Only measured steps, one in ten, are fed back: their norms come from a pass of their own."""
    torch.manual_seed(0)
    trainer = Trainer(make(), cross_entropy, Learning(steps=99, device="cpu"))
    sampler = BatchSampler(40, 10, 8, Sampling(), seed=0, report_every=10)
    x, y = torch.randn(40, 5, 3), torch.arange(40) % 2
    for step in range(10):
        draw = sampler.draw(step)
        rows = torch.from_numpy(draw.indices)
        result = trainer.step(step, (x[rows],), y[rows], draw.coefficients, norms=True, measure=step == 9)
        sampler.learned(step, draw, result, measure=step == 9)
    assert sampler.report(10)["feedback"] == pytest.approx(0.1)
    (said,) = [record.message for record in caplog.records if "yield no norms of their minibatches" in record.message]
    assert why in said


@pytest.mark.parametrize("block", [1, 8, 32])
def test_steps_observed_as_a_block_count_as_they_do_one_by_one(block):
    """Over several reports, with the gate opening in between; nothing is fed back, so that the weights are equal."""
    n, norms = 400, np.where(np.arange(400) % 10, 0.1, 10.0)
    samplers = [
        BatchSampler(n, 100, 16, Sampling(feedback=False, gate_gain=1.5), seed=0, report_every=5, block=block)
        for _ in range(2)
    ]
    for sampler in samplers:
        for chunk in range(4):
            sampler.update(chunk, norms[chunk * 100 : (chunk + 1) * 100].astype("f4"), 0)
    for start in range(0, 96, block):
        for sampler, size in zip(samplers, (1, block), strict=True):
            draws = [sampler.draw(step) for step in range(start, start + block)]
            steps = [
                Learned(step, draw, Step(1.0, norms[draw.indices], 0.1, 1.0, False), (step + 1) % 5 == 0)
                for step, draw in enumerate(draws, start)
            ]
            for first in range(0, block, size):
                sampler.learned_all(steps[first : first + size])
    one, other = (sampler.report(96) for sampler in samplers)
    assert one == pytest.approx(other, nan_ok=True, rel=1e-9)
    assert samplers[0].open
    assert [sampler.gate_step for sampler in samplers] == [samplers[0].gate_step] * 2


@pytest.mark.parametrize("block", [1, 8, 32])
def test_a_minibatch_depends_on_seed_and_step_not_on_where_its_block_is_entered(block):
    """As after the gate has opened in the middle of a block."""
    first, second = (BatchSampler(400, 100, 16, Sampling(), seed=3, report_every=5, block=block) for _ in range(2))
    for step in range(40, 48):
        first.draw(step)
    for step in (47, 44, 46):
        second._drawn = {}
        assert np.array_equal(second.draw(step).indices, first.draw(step).indices)
    assert not np.array_equal(first.draw(44, attempt=1).indices, first.draw(44).indices)

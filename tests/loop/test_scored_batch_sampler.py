"""Weights of scorers in a loop's batch sampler: what they show of the gain, and what reaches every process."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dask_isgd as isgd
from dask_isgd.core import models
from dask_isgd.events import Control
from dask_isgd.loop.chunk_gain import draw_in_chunk
from dask_isgd.loop.cluster_link import ClusterLink, unwrapped
from dask_isgd.loop.scored_batch_sampler import ScoredBatchSampler
from dask_isgd.sampling import ImportanceSampler

N, CHUNK = 1000, 64
NORMS = np.random.default_rng(0).exponential(size=N) ** 2 + 0.01
FRESH = NORMS * np.random.default_rng(1).lognormal(sigma=0.3, size=N)


def chunk_of(values: np.ndarray, chunk: int) -> np.ndarray:
    return values[chunk * CHUNK : (chunk + 1) * CHUNK].astype(np.float32)


def scored() -> ImportanceSampler:
    sampler = ImportanceSampler(N, CHUNK, isgd.Sampling(gate="open"))
    for chunk in range(sampler.n_chunks):
        sampler.update(chunk, chunk_of(NORMS, chunk), 0)
    return sampler


@pytest.mark.parametrize("uniform", [True, False])
def test_draws_in_all_chunks_are_together_draws_of_the_proposal(uniform):
    """Their coefficients and probabilities are those of the whole, and Σ c g² / count tends to its expectation."""
    sampler, rng = scored(), np.random.default_rng(2)
    q = np.full(N, 1 / N) if uniform else sampler.probabilities()
    counts, second, drawn = np.zeros(N), 0.0, 0
    for chunk in range(sampler.n_chunks):
        for _ in range(40):
            draw, norms = draw_in_chunk(sampler, chunk, chunk_of(FRESH, chunk), rng, uniform=uniform)
            assert norms == pytest.approx(FRESH[draw.indices], rel=1e-6)
            assert draw.probabilities == pytest.approx(q[draw.indices], rel=1e-6)
            assert draw.coefficients == pytest.approx(1 / (N * q[draw.indices]), rel=1e-6)
            np.add.at(counts, draw.indices, 1)
            second += float((draw.coefficients**2 * norms**2).sum())
            drawn += len(draw.indices)
    assert counts / drawn == pytest.approx(q, abs=6 * np.sqrt(q.max() / drawn))
    assert second / drawn == pytest.approx((FRESH**2 / (N**2 * q)).sum(), rel=0.05)


def test_norms_that_are_not_finite_show_nothing():
    sampler, norms = scored(), chunk_of(FRESH, 3)
    norms[::2] = np.nan
    draw, _ = draw_in_chunk(sampler, 3, norms, np.random.default_rng(0), uniform=False)
    assert (draw.indices % 2 == 1).all()
    assert draw_in_chunk(sampler, 3, np.full(CHUNK, np.nan, "f4"), np.random.default_rng(0), uniform=True) is None


def sampler_of(batches, **sampling) -> ScoredBatchSampler:
    """A sampler that receives a list of rewritten chunks before each block."""
    settings = {"sampling": isgd.Sampling(**sampling), "seed": 0, "start": 0, "known": []}
    return ScoredBatchSampler(N, 16, chunk_size=CHUNK, rewritten=lambda: next(batches, []), **settings)


def sweeps(values, times):
    """Each block brings two chunks, in turn."""
    chunks = [chunk for _ in range(times) for chunk in range(-(-N // CHUNK))]
    for first in range(0, len(chunks), 2):
        yield [(chunk, chunk_of(values, chunk), 4 * first) for chunk in chunks[first : first + 2]]


def drawn(sampler, count):
    found = []
    while len(found) < count:
        for batch in sampler:
            found.append([pair.coefficient for pair in batch])
            sampler.made(len(found) - 1)
    return np.array(found)


def test_the_gate_opens_by_the_scorers_norms_alone_at_the_gain_of_the_old_weights():
    sampler = sampler_of(sweeps(NORMS, 30))
    coefficients = drawn(sampler, 8 * 240)
    assert (coefficients[:64] == 1).all()
    assert sampler.open
    q = sampler.drawing.sampler.probabilities()
    exact = (NORMS**2).mean() / (NORMS**2 / (N**2 * q)).sum()
    assert sampler.candidate_gain == pytest.approx(exact, rel=0.1)
    assert sampler.gain == pytest.approx(exact, rel=0.25)
    assert coefficients[-100:].std() > 0.3


def test_a_closed_gate_that_only_probes_opens_by_the_fresh_norms_of_the_oldest_chunks():
    """First all norms are equal, then they are as uneven as elsewhere here; chunks come one by one."""

    def one_by_one():
        for part in sweeps(np.ones(N), 30):
            yield part
        for part in sweeps(NORMS, 12):
            for chunk in part:
                yield [chunk]

    sampler = sampler_of(one_by_one())
    drawn(sampler, 8 * 240)
    gate = sampler.drawing.monitor._gate
    assert gate.probing
    assert sampler.candidate_gain == pytest.approx(1.0)
    drawn(sampler, 8 * 380)
    assert sampler.open, gate.reason
    assert sampler.candidate_gain > 1.5


def test_the_gate_stays_closed_if_old_weights_say_nothing_of_fresh_norms():
    """Norms are permuted from sweep to sweep."""
    rng = np.random.default_rng(3)
    noise = (part for _ in range(30) for part in sweeps(rng.permutation(NORMS), 1))
    sampler = sampler_of(noise, ema_decay=0.0)
    drawn(sampler, 8 * 240)
    assert not sampler.open
    assert sampler.candidate_gain < 1


def test_the_loops_own_norms_take_the_place_of_the_scorers():
    sampler = sampler_of(sweeps(np.ones(N), 30), gate="open")
    for _ in range(10):
        for batch in sampler:
            index = [pair.row for pair in batch]
            sampler.update(index, NORMS[index])
    assert sampler.gain != pytest.approx(1.0, abs=0.05)


def test_a_loop_without_updates_resumes_after_the_steps_that_it_reports():
    """What workers took ahead is drawn again."""
    first = sampler_of(iter([]), gate="open")
    passing = iter(first)
    batches = [next(passing) for _ in range(10)]
    first.made(5)
    assert first.consumed == 6
    again = sampler_of(iter([]), gate="open")
    again.load_state_dict(first.state_dict())
    assert [next(it) for it in [iter(again)] for _ in range(4)] == batches[6:]


def test_later_scores_of_the_run_directory_are_kept_when_a_state_is_loaded():
    known = [(0, chunk_of(NORMS, 0), 50), (1, chunk_of(NORMS, 1), 5)]
    first = sampler_of(iter([[(1, chunk_of(FRESH, 1), 10)]]), gate="open")
    next(iter(first))
    settings = {"sampling": isgd.Sampling(gate="open"), "seed": 0, "start": 0, "known": known}
    resumed = ScoredBatchSampler(N, 16, chunk_size=CHUNK, rewritten=list, **settings)
    resumed.load_state_dict(first.state_dict())
    versions = resumed.drawing.sampler.versions
    assert versions[:2].tolist() == [50, 10]
    assert np.isnan(versions[2:]).all()


def test_a_scheduler_that_never_replies_is_said_once(caplog):
    """Its publication stays on its way; nothing waits for it, and the next version goes out once it replies."""
    model, offered = torch.nn.Linear(2, 2), []
    spec = SimpleNamespace(name="run", learning=isgd.Learning(steps=9, publish_every=1))
    link = ClusterLink(None, spec, models.signature(model), 0)
    link._publisher = SimpleNamespace(offer=lambda _, step: offered.append(step))
    link._timeout = 0.0
    with caplog.at_level(logging.WARNING, "dask_isgd"):
        for link.step in range(9):
            link._publisher.is_ready = lambda: link.step in (0, 8)
            link._publish_if_due(model)
    assert offered == [0, 8]
    assert [record.message for record in caplog.records] == [
        "run run: the cluster has not taken version 0 within 0 s, and scores get older"
    ]


def test_a_wrapped_model_is_published_without_its_wrapper():
    model = torch.nn.Linear(2, 2)
    assert unwrapped(torch.compile(torch.nn.DataParallel(model), backend="eager")) is model


def linked(**parts) -> ClusterLink:
    spec = SimpleNamespace(name="run", attempt=1, learning=isgd.Learning(steps=9, publish_every=1))
    link = ClusterLink(None, spec, {}, 0)
    vars(link).update(parts)
    return link


def test_a_chunk_that_cannot_be_read_keeps_its_weights_and_later_ones_are_used(caplog):
    found = [(3, chunk_of(NORMS, 3), 7), OSError("stale file handle"), OSError("again"), (4, chunk_of(NORMS, 4), 8)]

    def get():
        each = found.pop(0) if found else None
        if isinstance(each, Exception):
            raise each
        return each

    link = linked(_events=SimpleNamespace(drain=list), _reader=SimpleNamespace(get=get))
    with caplog.at_level(logging.WARNING, "dask_isgd"):
        assert [(chunk, version) for chunk, _, version in link.rewritten()] == [(3, 7), (4, 8)]
    assert [record.message for record in caplog.records] == [
        "run run: weights cannot be read, and stay as they are until they are scored again: stale file handle"
    ]


def test_a_stop_ends_scoring_and_is_announced():
    stop, said = Control(run="r", incarnation=0, attempt=1, want="stop"), []
    link = linked(
        _events=SimpleNamespace(drain=lambda: [stop]),
        _reader=SimpleNamespace(get=lambda: None),
        announcer=SimpleNamespace(ended=lambda *outcome: said.append(outcome)),
    )
    assert link.rewritten() == []
    assert link.stopped
    assert said == [("stopped", 0)]

"""The summary of the weights against brute force, and small enough for an event."""

import msgpack
import numpy as np
import pytest

from dask_isgd.coordinator import weight_summary
from dask_isgd.events import WeightSummary, parse

NAN = np.nan


@pytest.mark.parametrize(
    ("versions", "step", "cells", "wanted"),
    [
        ([10, 20, 30], 30, 256, [20, 10, 0]),
        ([10, NAN, 30], 30, 256, [20, -1, 0]),
        ([40], 30, 256, [0]),  # a younger incarnation's version: never negative
        ([1, 2, 3, 4, 5], 5, 2, [4, 1]),  # the oldest of each range
        ([1, 2, NAN, 4, 5], 5, 2, [-1, 1]),
        ([NAN], 5, 256, [-1]),
    ],
)
def test_cells_are_the_oldest_of_their_range(versions, step, cells, wanted):
    assert weight_summary.ages(versions, step, cells)["cells"] == wanted


@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 1000, 195_313])
def test_ages_of_many_chunks(n):
    rng = np.random.default_rng(n)
    versions = np.where(rng.random(n) < 0.1, NAN, rng.integers(0, 5000, n))
    found = weight_summary.ages(versions, 6000)
    per_cell = -(-n // 256)
    assert len(found["cells"]) == -(-n // per_cell) <= 256
    for i, cell in enumerate(found["cells"]):
        inside = 6000 - versions[i * per_cell : (i + 1) * per_cell]
        assert cell == (-1 if np.isnan(inside).any() else inside.max())
    assert found["never"] == np.isnan(versions).sum()
    assert sum(found["age_counts"]) == n - found["never"]
    edges = np.linspace(0, found["age_high"], len(found["age_counts"]) + 1)
    known = 6000 - versions[~np.isnan(versions)]
    assert found["age_counts"] == np.histogram(known, edges)[0].tolist()


def test_weights_against_brute_force():
    weights = np.random.default_rng(0).lognormal(0, 2, 5000)
    weights[:40] = 0
    found = weight_summary.weights(np.concatenate([weights, [NAN] * 10]))
    assert found["zeros"] == 40
    assert found["sampled"] == 5000
    assert sum(found["weight_counts"]) == 4960
    assert found["weight_low"] == pytest.approx(np.log10(weights[40:].min()), rel=1e-5)
    assert found["weight_high"] == pytest.approx(np.log10(weights.max()), rel=1e-5)
    assert found["top_share"] == pytest.approx(np.sort(weights)[-50:].sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize(("sample", "share"), [([], None), ([NAN], None), ([0.0, 0.0], None), ([3.0], 1.0)])
def test_weights_of_next_to_nothing(sample, share):
    found = weight_summary.weights(sample)
    assert found["top_share"] == share
    assert sum(found["weight_counts"]) == sum(1 for x in sample if x > 0)
    assert found["weight_low"] < found["weight_high"]


def test_the_sample_is_bounded_and_moves_over_all_chunks():
    seen = set()
    for turn in range(200):
        chunks = weight_summary.sampled_chunks(1000, 2048, turn)
        assert len(chunks) * 2048 <= weight_summary.SAMPLE
        seen |= set(chunks.tolist())
    assert seen == set(range(1000))
    assert weight_summary.sampled_chunks(3, 10**6, 5).tolist() == [2]
    assert weight_summary.sampled_chunks(23, 64, 1).tolist() == list(range(23))


def test_an_event_is_below_4_kb_and_survives_the_wire():
    rng = np.random.default_rng(0)
    versions = rng.integers(0, 10**6, 200_000).astype(float)
    summarizer = weight_summary.WeightSummarizer(
        lambda chunk: rng.lognormal(0, 2, 512).astype(np.float32), 200_000, 512
    )
    event = WeightSummary(run="abc", incarnation=1, step=10**6, **summarizer.summarize(versions, 10**6))
    packed = msgpack.packb(event.record())
    assert len(packed) < 4096
    assert parse(msgpack.unpackb(packed)) == event


def test_a_summary_reads_scored_chunks_only_and_others_each_time():
    read: list[int] = []

    def one(chunk):
        read.append(chunk)
        return np.full(4, float(chunk), np.float32)

    versions = np.where(np.arange(200) % 2, NAN, 5.0)
    summarizer = weight_summary.WeightSummarizer(one, 200, 4)
    first = summarizer.summarize(versions, 9)
    assert (first["sampled"], first["never"], first["chunks"]) == (4 * len(read), 100, 200)
    assert all(chunk % 2 == 0 for chunk in read)
    for _ in range(20):
        summarizer.summarize(versions, 9)
    assert set(read) == set(range(0, 200, 2))


def test_a_run_without_scores_is_summarised_without_a_read():
    summarizer = weight_summary.WeightSummarizer(lambda chunk: pytest.fail("read"), 3, 4)
    found = summarizer.summarize(np.full(3, NAN), 0)
    assert (found["cells"], found["sampled"], found["top_share"]) == ([-1, -1, -1], 0, None)

"""Summary of a run's weights in a few numbers: how old, how large. numpy in, plain Python out.

The summary fits an event: at most 256 cells of ages and two histograms, less than 4 kB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CELLS = 256
"""Largest number of cells in the age map; a cell is a range of neighbouring chunks."""
NEVER = -1
"""Age of a cell with a chunk that was never scored: older than any number."""
AGE_BINS = 24
WEIGHT_BINS = 40
SAMPLE = 65_536
"""Weights read for one histogram; a larger run is sampled, with other chunks each time."""
READS = 64
"""Largest number of chunks read for one summary: the coordinator submits scoring tasks in the same thread."""
_TOP = 0.01


def ages(versions: ArrayLike, step: float, cells: int = CELLS) -> dict[str, Any]:
    """Return the ages of all chunks, in steps, from the versions (n_chunks,) they were scored at; NaN: never.

    ``cells``: the oldest age in each range of chunks, NEVER if one of them was never scored.
    ``age_counts``: number of scored chunks in equal bins from 0 to ``age_high``.
    """
    scored_at = np.asarray(versions, np.float64)
    age = np.maximum(0.0, step - scored_at)
    known = age[np.isfinite(age)]
    per_cell = max(1, -(-len(age) // cells))
    oldest = np.full(-(-len(age) // per_cell) * per_cell, -np.inf)
    oldest[: len(age)] = np.where(np.isfinite(age), age, np.inf)
    cell = oldest.reshape(-1, per_cell).max(axis=1)
    high = float(known.max()) + 1.0 if len(known) else 1.0
    counts = np.histogram(known, bins=int(min(AGE_BINS, high)), range=(0.0, high))[0]
    return {
        "cells": [NEVER if np.isinf(value) else int(value) for value in cell],
        "chunks": len(age),
        "never": len(age) - len(known),
        "age_high": high,
        "age_counts": counts.tolist(),
    }


def weights(sample: ArrayLike) -> dict[str, Any]:
    """Return the distribution of weights (n,); NaN (never scored) is left out.

    ``weight_counts``: positive weights in bins of equal width in log10 from ``weight_low`` to ``weight_high``;
    ``zeros``: number of weights that are zero; ``top_share``: share of the sum held by the largest 1 %, None
    if the sum is zero.
    """
    values = np.asarray(sample, np.float64)
    values = values[np.isfinite(values) & (values >= 0)]
    positive = np.log10(values[values > 0])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 0.0)
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    total = float(values.sum())
    n_top = max(1, int(np.ceil(_TOP * len(values))))
    largest = np.partition(values, -n_top)[-n_top:] if len(values) else values
    return {
        "weight_low": float(f"{low:.6g}"),
        "weight_high": float(f"{high:.6g}"),
        "weight_counts": np.histogram(positive, bins=WEIGHT_BINS, range=(low, high))[0].tolist(),
        "zeros": len(values) - len(positive),
        "sampled": len(values),
        "top_share": float(f"{largest.sum() / total:.6g}") if total > 0 else None,
    }


def sampled_chunks(n_chunks: int, chunk_size: int, turn: int, limit: int = SAMPLE) -> NDArray[np.int64]:
    """Return evenly spread chunks with about ``limit`` weights, READS at most; each ``turn`` shifts them by one.

    >>> sampled_chunks(8, 1, 1, limit=4).tolist()
    [1, 3, 5, 7]
    """
    count = min(n_chunks, READS, max(1, limit // chunk_size))
    spread = np.arange(count) * n_chunks // count
    return np.unique((spread + turn) % n_chunks).astype(np.int64)


class WeightSummarizer:
    """Summarizes weights that are read chunk by chunk with ``read``, other chunks each time."""

    def __init__(self, read: Callable[[int], NDArray[np.float32]], n_chunks: int, chunk_size: int) -> None:
        self._read, self._n_chunks, self._chunk_size = read, n_chunks, chunk_size
        self._turn = 0

    def summarize(self, versions: NDArray[np.float64], step: float) -> dict[str, Any]:
        """Return the fields of a ``WeightSummary`` event at ``step``; raises what ``read`` raises."""
        chosen = sampled_chunks(self._n_chunks, self._chunk_size, self._turn)
        self._turn += 1
        found = [self._read(int(chunk)) for chunk in chosen if np.isfinite(versions[chunk])]
        return {**ages(versions, step), **weights(np.concatenate(found) if found else np.empty(0))}

"""The weights of a run in a few numbers: how old, how heavy. numpy in, plain Python out.

What comes out fits an event: at most 256 cells of ages and two histograms, less than 4 kB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CELLS = 256
"""Cells of the age map at most; a cell stands for a range of neighbouring chunks."""
NEVER = -1
"""Age of a cell in which a chunk was never scored: older than any number."""
AGE_BINS = 24
WEIGHT_BINS = 40
SAMPLE = 65_536
"""Weights looked at for one histogram; a larger run shows a sample that moves on each time."""
READS = 64
"""Chunks read for one portrait at most: the coordinator feeds the scorers in the same thread."""
_TOP = 0.01


def ages(versions: ArrayLike, step: float, cells: int = CELLS) -> dict[str, Any]:
    """The ages of all chunks, in steps, from the versions (n_chunks,) they were scored at; NaN: never.

    ``cells``: the oldest age in each range of chunks, NEVER where one was never scored.
    ``age_counts``: scored chunks in equal bins from 0 to ``age_high``.
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
    """The distribution of weights (n,); NaN (never scored) is left out.

    ``weight_counts``: positive weights in bins equal in log10 from ``weight_low`` to ``weight_high``;
    ``zeros``: weights that are zero; ``top_share``: share of the sum held by the heaviest 1 %, None
    where the sum is zero.
    """
    values = np.asarray(sample, np.float64)
    values = values[np.isfinite(values) & (values >= 0)]
    positive = np.log10(values[values > 0])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 0.0)
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    total = float(values.sum())
    heavy = np.partition(values, -_heaviest(len(values)))[-_heaviest(len(values)) :] if len(values) else values
    return {
        "weight_low": float(f"{low:.6g}"),
        "weight_high": float(f"{high:.6g}"),
        "weight_counts": np.histogram(positive, bins=WEIGHT_BINS, range=(low, high))[0].tolist(),
        "zeros": len(values) - len(positive),
        "sampled": len(values),
        "top_share": float(f"{heavy.sum() / total:.6g}") if total > 0 else None,
    }


def _heaviest(n: int) -> int:
    return max(1, int(np.ceil(_TOP * n)))


def sampled_chunks(n_chunks: int, chunk_size: int, turn: int, limit: int = SAMPLE) -> NDArray[np.int64]:
    """Chunks that hold about ``limit`` weights, READS at most, spread evenly; each ``turn`` moves on by one.

    >>> sampled_chunks(8, 1, 1, limit=4).tolist()
    [1, 3, 5, 7]
    """
    count = min(n_chunks, READS, max(1, limit // chunk_size))
    spread = np.arange(count) * n_chunks // count
    return np.unique((spread + turn) % n_chunks).astype(np.int64)


class WeightSummarizer:
    """Draws one portrait after another of weights that are read chunk by chunk with ``read``."""

    def __init__(self, read: Callable[[int], NDArray[np.float32]], n_chunks: int, chunk_size: int) -> None:
        self._read, self._n_chunks, self._chunk_size = read, n_chunks, chunk_size
        self._turn = 0

    def draw(self, versions: NDArray[np.float64], step: float) -> dict[str, Any]:
        """The fields of a ``WeightSummary`` event at ``step``; raises what ``read`` raises."""
        chosen = sampled_chunks(self._n_chunks, self._chunk_size, self._turn)
        self._turn += 1
        seen = [self._read(int(chunk)) for chunk in chosen if np.isfinite(versions[chunk])]
        return {**ages(versions, step), **weights(np.concatenate(seen) if seen else np.empty(0))}

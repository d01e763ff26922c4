"""What rank 0 sends to the others between steps, as one tensor of fixed length.

Shapes: M examples in the global minibatch; at most ``STEPS`` minibatches in a packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dask_isgd.learner.group.shared_draws import Drawn

STEPS = 8
"""Minibatches in a packet, and steps in a stretch, at most."""
_HEADER = 9


class Stretch(NamedTuple):
    """Steps that all ranks take without hearing of one another, but for the sums of gradients."""

    first: int
    """Its first step."""
    steps: int
    """Its steps; 0: rank 0 is busy, and its next packet follows."""
    norms: int
    """Bit i: whether the examples' norms are computed in step ``first + i``."""
    until: int
    """Nothing is drawn ahead for this step or later ones."""
    end: bool = False
    """Whether this is the end: no other packet follows."""
    rate: float = 1.0
    """Factor of the learning rate."""

    def wants_norms(self, step: int) -> bool:
        """Whether the examples' norms of a step are computed."""
        return bool(self.norms >> (step - self.first) & 1)


class Packet(NamedTuple):
    """A stretch, and minibatches by step, which are consecutive."""

    stretch: Stretch
    drawn: Mapping[int, Drawn]
    more: bool = False
    """Whether the next packet has more minibatches, for the same stretch."""

    def encode(self, size: int) -> Tensor:
        """Return int64 numbers, as many for every packet of minibatches of ``size`` examples."""
        numbers = np.zeros(length(size), np.int64)
        *counts, rate = self.stretch
        numbers[: _HEADER - 1] = [*counts, self.more, min(self.drawn, default=0), len(self.drawn)]
        numbers[_HEADER - 1 : _HEADER] = np.array([rate]).view(np.int64)
        rows = numbers[_HEADER:].reshape(STEPS, 2, size)
        for row, drawn in zip(rows, self.drawn.values(), strict=False):
            row[0] = drawn.indices
            row[1] = drawn.coefficients.view(np.int64)
        return torch.from_numpy(numbers)


def length(size: int) -> int:
    """Return how many numbers a packet of minibatches of ``size`` examples has."""
    return _HEADER + STEPS * 2 * size


def decode(numbers: Tensor, size: int) -> Packet:
    """Return the packet that was encoded."""
    array = numbers.numpy()
    start, steps, norms, until, end, more, first, count = array[: _HEADER - 1].tolist()
    rate = float(array[_HEADER - 1 : _HEADER].view(np.float64)[0])
    rows = array[_HEADER:].reshape(STEPS, 2, size)[:count]
    drawn = {first + i: Drawn(row[0].copy(), row[1].view(np.float64).copy()) for i, row in enumerate(rows)}
    return Packet(Stretch(start, steps, norms, until, bool(end), rate), drawn, bool(more))

"""How far clipping moves the expected gradient, measured on reporting steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

COORDINATES = 4096
"""Coordinates of the gradient that are looked at: norms of a random part stand for norms of the whole."""
DECAY = 0.9
"""Share of the sums that each reporting step leaves in place: a memory of about ten."""


class ClipBias:
    """||E[k g] - E[g]|| / ||E[g]|| for gradients g of minibatches and factors k of their clipping.

    The square of a mean's norm is estimated from the products of different minibatches, as the squares of single ones
    hold their variance, too: (||Σ g||² - Σ ||g||²) / (number of ordered pairs), without bias as long as the
    parameters hardly move between reports. Not part of a step: nothing here changes what is learned.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        sizes = [p.numel() for p in parameters]
        total = sum(sizes)
        n = min(total, COORDINATES)
        generator = torch.Generator().manual_seed(0)
        places = ((torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) * (total / n)).long()
        places.clamp_(max=total - 1)
        ends = torch.tensor(sizes).cumsum(0)
        owners = torch.searchsorted(ends, places, right=True)
        device = parameters[0].device
        self._places = [
            (index, (places[owners == index] - (ends[index] - sizes[index])).to(device))
            for index in sorted(set(owners.tolist()))
        ]
        self._sums = torch.zeros(2, n, device=device)  # of (k - 1) g and of g
        self._squares = torch.zeros(2, device=device)
        self._counts = torch.zeros(2, device=device)  # Σ of the reports' shares, and of their squares
        self._decays = torch.tensor([DECAY, DECAY**2], device=device)

    def observe(self, gradients: Sequence[Tensor | None], divisor: Tensor) -> None:
        """Add a minibatch's ``gradients`` before clipping (None: zero), and what clipping divides them by (0-d)."""
        taken = []
        for index, places in self._places:
            gradient = gradients[index]
            taken.append(self._zeros(places) if gradient is None else torch.take(gradient, places).float())
        gradient = torch.cat(taken)
        both = torch.stack((gradient / divisor - gradient, gradient))
        self._sums = DECAY * self._sums + both
        self._squares = DECAY**2 * self._squares + both.square().sum(1)
        self._counts = self._counts * self._decays + 1.0

    def _zeros(self, places: Tensor) -> Tensor:
        return torch.zeros(len(places), device=self._sums.device)

    def squares(self) -> Tensor:
        """Return (2,) estimates, without bias, of the squared norms of bias and mean; NaN before the second report."""
        return (self._sums.square().sum(1) - self._squares) / (self._counts[0] ** 2 - self._counts[1])

    def value(self) -> Tensor:
        """Return the relative bias, 0-d; NaN while no mean gradient can be told from the noise."""
        bias, mean = self.squares()
        return torch.where(mean > 0, (bias.clamp(min=0.0) / mean).sqrt(), torch.nan)

    def state(self) -> dict[str, Tensor]:
        """Return the sums, for a checkpoint."""
        return {"sums": self._sums, "squares": self._squares, "counts": self._counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state()``, to the bit."""
        self._sums, self._squares, self._counts = (
            state[name].to(self._sums.device) for name in ("sums", "squares", "counts")
        )

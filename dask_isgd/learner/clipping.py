"""Clips the gradient of a weighted minibatch without waiting for the device.

A row whose weight was too low is drawn with a coefficient above 1, and if its gradient has grown meanwhile,
the step is several times as long as usual: importance sampling's own kind of accident. ``Clipping`` shortens such
steps, and only by what a coefficient above 1 can have added, so that a uniform minibatch is never clipped by
the relative bound: where all coefficients are 1, importance sampling is to blame for nothing, and clipping
would move the optimum (rare large gradients are what a mean consists of).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DECAY = 0.98
"""Share of the running mean that each step leaves in place: a memory of about 50 steps."""
WARM_UP = 20
"""Steps whose norms are averaged before the relative bound applies."""
GROWTH = 2.0
"""A norm enters the running mean as at most this multiple of it: an outlier hardly raises it, and a lasting rise
doubles it every 35 steps."""

_WARM = 1.0 - DECAY ** (WARM_UP - 0.5)


class Clipped(NamedTuple):
    """What was done to a gradient; 0-d tensors on its device."""

    norm: Tensor
    """float32, before clipping."""
    clipped: Tensor
    """bool: whether the gradient was scaled."""
    factor: Tensor
    """float32 in (0, 1]: what it was multiplied by. Meaningless if the norm is not finite."""


class Clipping:
    """Scales gradients in place to an absolute bound and to one that follows the running mean of their norm.

    ``norm``: bound on the norm of every gradient, as in ``torch.nn.utils.clip_grad_norm_``. ``mean_factor``:
    bound as a multiple of the running mean of the norm; a gradient is multiplied by no less than one over the
    largest coefficient of its minibatch, hence by 1 if draws are uniform. None: no such bound.
    """

    def __init__(self, norm: float | None, mean_factor: float | None, device: torch.device | str = "cpu") -> None:
        self.norm, self.mean_factor = norm, mean_factor
        self._mean = torch.zeros((), dtype=torch.float32, device=device)
        self._weight = torch.zeros_like(self._mean)  # 1 - DECAY**n after n norms
        self._one = torch.ones_like(self._mean)

    def __call__(self, gradients: Sequence[Tensor], norm: Tensor, largest_coefficient: float) -> Clipped:
        """Clip ``gradients``, whose total norm is ``norm`` (0-d, on their device).

        ``largest_coefficient`` is that of the minibatch. Queues work on the device and waits for none of it. A norm
        that is not finite leaves the running mean unchanged; whether to step is up to the caller.
        """
        norm = norm.detach().float()
        factor = None
        if self.mean_factor is not None:
            factor = self._relative(norm, self.mean_factor, min(1.0, 1.0 / largest_coefficient))
        if self.norm is not None:
            absolute = _quotient(self.norm, norm).clamp(max=1.0)
            factor = absolute if factor is None else torch.minimum(factor, absolute)
        if factor is None:
            return Clipped(norm, torch.zeros_like(norm, dtype=torch.bool), torch.ones_like(norm))
        clipped = factor < 1.0
        if norm.device.type != "cpu" or clipped:  # only on the CPU does looking cost nothing, and scaling much
            torch._foreach_mul_(list(gradients), factor)
        return Clipped(norm, clipped, factor)

    def _relative(self, norm: Tensor, mean_factor: float, least: float) -> Tensor:
        mean = torch.where(self._weight > _WARM, self._mean, torch.inf)
        counted = torch.minimum(norm, GROWTH * mean)
        weight = torch.lerp(self._weight, self._one, 1.0 - DECAY)
        # The first norm's share is 1: the zero that the mean starts from doesn't count.
        follows = torch.lerp(self._mean, counted, (1.0 - DECAY) / weight)
        finite = torch.isfinite(norm)
        self._mean, self._weight = torch.where(finite, follows, self._mean), torch.where(finite, weight, self._weight)
        return _quotient(mean_factor * mean, norm).clamp(least, 1.0)

    def state(self) -> dict[str, Tensor]:
        """Return the running mean as two 0-d tensors, for a checkpoint."""
        return {"mean": self._mean, "weight": self._weight}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state()``, to the bit."""
        self._mean, self._weight = state["mean"].to(self._mean), state["weight"].to(self._weight)


def _quotient(bound: Tensor | float, norm: Tensor) -> Tensor:
    return bound / norm.clamp(min=torch.finfo(norm.dtype).tiny)

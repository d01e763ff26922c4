"""Clips the gradient of a weighted minibatch without waiting for the device.

An example whose weight is too low is drawn with a coefficient above 1. If its gradient has grown since it was scored,
the step is longer than usual: the one kind of accident that importance sampling adds to SGD. ``Clipping`` shortens such
steps, and the less the closer the minibatch's largest coefficient is to 1. Uniform draws have coefficients of 1, so the
relative bound never clips them: a mean may consist of rare large gradients, and clipping those would move the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
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
POWER = 4
"""A gradient is divided by no more than this power of its minibatch's largest coefficient. One misjudged example
explains a power of 1; but a step that is too long lengthens those after it, and a loss that blows up must be held."""

_WARM = 1.0 - DECAY ** (WARM_UP - 0.5)


class Clipped(NamedTuple):
    """How a gradient is clipped; 0-d tensors on its device."""

    norm: Tensor
    """float32, before clipping."""
    clipped: Tensor
    """bool: whether the factor is below 1."""
    factor: Tensor
    """float32 in (0, 1]: what the gradient is multiplied by. Meaningless if the norm is not finite."""


class Clipping:
    """Holds gradients to an absolute bound and to one that follows the running mean of their norm.

    ``norm``: bound on the norm of every gradient, as in ``torch.nn.utils.clip_grad_norm_``. ``mean_factor``:
    bound as a multiple of the running mean of the norm; a gradient is divided by no more than the power ``POWER``
    of its minibatch's largest coefficient, hence by 1 if draws are uniform. None: no such bound.
    """

    def __init__(self, norm: float | None, mean_factor: float | None, device: torch.device | str = "cpu") -> None:
        self.norm, self.mean_factor = norm, mean_factor
        self._mean = torch.zeros((), dtype=torch.float32, device=device)
        self._weight = torch.zeros_like(self._mean)  # 1 - DECAY**n after n norms
        self._one = torch.ones_like(self._mean)

    def __call__(self, norm: Tensor, largest_coefficient: float) -> Clipped | None:
        """Return how a gradient of total ``norm`` (0-d, on its device) is clipped; None if there is no bound.

        ``largest_coefficient`` is that of the minibatch. Queues work on the device and waits for none of it. A norm
        that is not finite leaves the running mean unchanged; whether to step is up to the caller.
        """
        norm = norm.detach().float()
        factor = None
        if self.mean_factor is not None:
            factor = self._relative(norm, self.mean_factor, min(1.0, largest_coefficient**-POWER))
        if self.norm is not None:
            absolute = _quotient(self.norm, norm).clamp(max=1.0)
            factor = absolute if factor is None else torch.minimum(factor, absolute)
        return None if factor is None else Clipped(norm, factor < 1.0, factor)

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

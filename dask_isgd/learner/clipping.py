"""Clips the gradient of a weighted minibatch without waiting for the device.

An example whose weight is too low is drawn with a coefficient above 1. If its gradient has grown since it was scored,
the step is longer than usual: the one kind of accident that importance sampling adds to SGD. ``Clipping`` shortens such
steps, and the less the closer the minibatch's largest coefficient is to 1. Uniform draws have coefficients of 1, so the
relative bound never clips them: a mean may consist of rare large gradients, and clipping those would move the optimum.

The bound is a mean of norms: of recent ones, or of those of about the last quarter of the run if that is larger. Where
noise vanishes (examples that can all be fitted), norms fall as steadily as the loss, and every cut from a step costs
progress; but a step that was usual a moment ago is no accident.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DECAY = 0.98
"""Share of the running mean that each step leaves in place: a memory of about 50 steps."""
MEMORY = round(1.0 / (1.0 - DECAY))
"""Steps between two updates of the long mean."""
LONG_SHARE = 4.0
"""The latest of n steps enters the long mean with weight ``LONG_SHARE``/n: a memory of about a quarter of them."""
WARM_UP = 20
"""Steps whose norms are averaged before the relative bound applies."""
GROWTH = 2.0
"""A norm enters the running mean as at most this multiple of it: an outlier hardly raises it, and a lasting rise
doubles it every 35 steps."""
POWER = 4
"""A gradient is divided by no more than this power of its minibatch's largest coefficient. One misjudged example
explains a power of 1; but a step that is too long lengthens those after it, and a loss that blows up must be held."""


class Clipped(NamedTuple):
    """How a gradient is clipped; 0-d tensors on its device."""

    divisor: Tensor
    """float32, at least 1: what the gradient is divided by. Meaningless if the norm is not finite."""
    clipped: Tensor
    """bool: whether the divisor is above 1."""


class Clipping:
    """Holds gradients to an absolute bound and to one that follows the running means of their norm.

    ``norm``: bound on the norm of every gradient, as in ``torch.nn.utils.clip_grad_norm_``. ``mean_factor``:
    bound as a multiple of the larger running mean of the norm; a gradient is divided by no more than the power
    ``POWER`` of its minibatch's largest coefficient, hence by 1 if draws are uniform. None: no such bound.
    """

    def __init__(self, norm: float | None, mean_factor: float | None, device: torch.device | str = "cpu") -> None:
        self.norm, self.mean_factor = norm, mean_factor
        self._mean = torch.zeros((), dtype=torch.float32, device=device)
        self._long = torch.zeros_like(self._mean)
        """The mean over about the last quarter of the run."""
        self._tiny = torch.full_like(self._mean, torch.finfo(torch.float32).tiny)
        self._counted = 0
        """Norms in the running means."""

    def __call__(self, norm: Tensor, largest_coefficient: float) -> Clipped | None:
        """Return how a gradient of total ``norm`` (0-d, on its device) is clipped; None if there is no bound.

        ``largest_coefficient`` is that of the minibatch. Queues work on the device and waits for none of it. A norm
        that is not finite leaves the running mean finite; whether to step is up to the caller.
        """
        norm = norm.float()
        divisor = None
        if self.mean_factor is not None:
            divisor = self._relative(norm, self.mean_factor, max(1.0, largest_coefficient**POWER))
        if self.norm is not None:
            absolute = (norm / self.norm).clamp(min=1.0)
            divisor = absolute if divisor is None else torch.maximum(divisor, absolute)
        return None if divisor is None else Clipped(divisor, divisor > 1.0)

    def _relative(self, norm: Tensor, mean_factor: float, most: float) -> Tensor | None:
        warm = self._counted >= WARM_UP
        divisor = None
        if warm:
            level = torch.maximum(self._mean, self._long)
            divisor = (norm / torch.add(self._tiny, level, alpha=mean_factor)).clamp_(1.0, most)
            counted = torch.fmin(norm, GROWTH * self._mean)
        else:
            counted = torch.where(torch.isfinite(norm), norm, self._mean)
        self._counted += 1
        # The first norm's share is 1: the zero that the mean starts from doesn't count.
        self._mean = torch.lerp(self._mean, counted, (1.0 - DECAY) / (1.0 - DECAY**self._counted))
        if self._counted % MEMORY == 0:
            updates = self._counted // MEMORY
            self._long = torch.lerp(self._long, self._mean, LONG_SHARE / (updates - 1.0 + LONG_SHARE))
        return divisor

    def tensors(self) -> dict[str, Tensor]:
        """Return the running means as 0-d tensors, for a checkpoint."""
        return {"mean": self._mean, "long": self._long}

    def state(self) -> dict[str, int]:
        """Return the rest, as plain JSON."""
        return {"counted": self._counted}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, int]) -> None:
        """Continue from ``tensors()`` and ``state()``, to the bit."""
        self._mean, self._long = (tensors[name].to(self._mean) for name in ("mean", "long"))
        self._counted = state["counted"]

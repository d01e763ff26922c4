"""The result of one optimizer step: launched on a device, read on the host when it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dask_isgd.errors import NonFiniteLossError
from dask_isgd.sampling import Draw
from dask_isgd.sampling.variance import square_of_mean

_SCALARS = 6


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    loss: float
    """(1/B) Σ c L: unbiased for the mean loss over the dataset."""
    norms: NDArray[np.float64] | None
    """(B,) gradient norms of the drawn examples at the parameters before the step, if known."""
    mean_gradient_sq_norm: float
    """Unbiased estimate of ||μ||², the squared norm of the mean gradient; NaN unless measured."""
    gradient_norm: float
    """Norm of the weighted gradient before clipping."""
    clipped: bool
    clip_bias: float = math.nan
    """||E[clipped gradient] - E[gradient]|| / ||E[gradient]|| at recent measured steps; NaN unless measured."""


class Learned(NamedTuple):
    """A step whose result has arrived."""

    step: int
    draw: Draw
    result: Step
    measured: bool
    chosen: bool = False
    """Whether the examples were chosen from several minibatches: such draws depend on one another."""


class LaunchedStep:
    """A step whose numbers are on their way from the device; making one does not wait for them.

    ``scalars``: loss, gradient norm, whether it was clipped, whether it was refused, bias of clipping and the product
    of the gradients of two halves (NaN if there were none), each 0-d. ``losses`` (B,) and ``indices`` (B,) name
    examples in errors. ``measured``: estimate ||μ||² from the norms.
    """

    def __init__(
        self,
        step: int,
        scalars: Sequence[Tensor],
        norms: Tensor | None,
        losses: Tensor,
        coefficients: NDArray[np.float64],
        indices: NDArray[np.int64] | None,
        *,
        measured: bool,
    ) -> None:
        self.step = step
        self._losses, self._coefficients, self._indices = losses, coefficients, indices
        self._measured, self._has_norms = measured, norms is not None
        numbers = torch.stack([s.float() for s in scalars])
        if norms is not None:
            numbers = torch.cat([numbers, norms])
        self._numbers, self._arrived = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> Step:
        """Wait for the device and return the numbers. Raises NonFiniteLossError if the step was refused."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers = self._numbers.cpu().double().numpy()
        loss, gradient_norm, clipped, refused, clip_bias, product = numbers[:_SCALARS].tolist()
        if refused:
            self._raise_not_finite()
        norms = numbers[_SCALARS:] if self._has_norms else None
        if norms is not None:
            norms = np.where(self._coefficients == 0.0, 0.0, norms)  # rows that contribute nothing
        if math.isnan(product):
            product = math.nan  # one object: steps compare equal
            if self._measured and norms is not None:
                product = square_of_mean(gradient_norm, self._coefficients, norms)
        return Step(
            loss, norms, product, gradient_norm, bool(clipped), clip_bias if clip_bias == clip_bias else math.nan
        )

    def _raise_not_finite(self) -> None:
        bad = torch.nonzero(~torch.isfinite(self._losses)).flatten().cpu().numpy()
        indices = self._indices
        if len(bad):
            error = NonFiniteLossError(
                f"step {self.step}: the loss of {len(bad)} of {len(self._losses)} examples is not finite "
                f"(indices {_first(bad if indices is None else indices[bad])}); the parameters of this step were "
                "neither published nor checkpointed. Lower the learning rate, clip the gradient (Learning.clip_norm), "
                "or look at those examples"
            )
            error.indices = tuple((bad if indices is None else indices[bad])[:10].tolist())
            raise error
        drawn = "" if indices is None else f" (drawn: indices {_first(indices)})"
        raise NonFiniteLossError(
            f"step {self.step}: the loss is finite, its gradient is not{drawn}; the parameters are those of the step "
            "before. Look for a root, a logarithm or a division in loss and model, or lower the learning rate"
        )


def _first(indices: NDArray[np.int64]) -> str:
    return f"{indices[:10].tolist()}{'…' * (len(indices) > 10)}"

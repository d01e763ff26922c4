"""One weighted optimizer step, its norms and its share of the variance: torch, no Dask.

Shapes: B examples in the minibatch. A step launches its work and does not wait for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.config import Learning
from dask_isgd.core import models
from dask_isgd.core.loss import Loss
from dask_isgd.errors import ModelError
from dask_isgd.learner.step import LaunchedStep, Step
from dask_isgd.learner.update import Update
from dask_isgd.norms import NormEngine, capture_norms, checked_losses

logger = logging.getLogger(__name__)


class Trainer:
    """A model, its optimizer and the weighted update; ``weighted``: whether coefficients differ from 1."""

    def __init__(self, model: nn.Module, loss: Loss, learning: Learning, *, weighted: bool = True) -> None:
        self.device = models.device_of(learning.device)
        self.model = model.to(self.device).train()
        self.loss = loss
        self.learning = learning
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError("model: got no trainable parameter, wanted at least one")
        self.update = Update(self.parameters, learning, weighted=weighted)
        self._nan = torch.tensor(torch.nan, device=self.device)
        self._captures = True
        self._engine: NormEngine | None = None
        self._warned = False

    def step(self, *args: Any, **kwargs: Any) -> Step:
        """Take a step as :meth:`launch` does, wait for it and return its result."""
        return self.launch(*args, **kwargs).result()

    def launch(
        self,
        step: int,
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        coefficients: NDArray[np.float64],
        *,
        norms: bool = False,
        measure: bool = False,
        indices: NDArray[np.int64] | None = None,
    ) -> LaunchedStep:
        """Update the parameters with the coefficient-weighted minibatch.

        ``coefficients`` (B,) are 1/(N q) of the draw. With ``norms`` the examples' norms are computed
        in the backward pass if the model allows it. With ``measure`` they are computed in any case, and
        ||μ||² is estimated, without bias if the draws are independent: from the norms of examples and gradient,
        or as the dot product of two halves' gradients if the backward pass cannot compute norms.
        ``indices`` (B,) only name examples in errors.

        A step whose loss or gradient is not finite moves nothing, nor does any later one; the result raises
        NonFiniteLossError.
        """
        # Random masks of step k depend on (seed, k) alone, so that a resumed run draws the same ones.
        _reseed(self.device, _mix(self.learning.seed, step))
        if self.learning.transform is not None:
            inputs = (self.learning.transform(*inputs),) if len(inputs) == 1 else self.learning.transform(*inputs)
        scale = self._scale(coefficients)
        for parameter in self.parameters:
            parameter.grad = None
        product = self._nan
        if (norms or measure) and self._captures:
            losses, found = self._backward(inputs, targets, scale, capture=True)
        elif measure and len(coefficients) > 1:
            found = self._engine_norms(inputs, targets)
            losses, product = self._backward_halves(inputs, targets, scale)
        else:
            found = self._engine_norms(inputs, targets) if measure else None
            losses, _ = self._backward(inputs, targets, scale, capture=False)
        loss = torch.dot(losses.float(), scale)
        moved = self.update(loss, float(coefficients.max()), measure=measure)
        return LaunchedStep(step, (loss, *moved, product), found, losses, coefficients, indices, measured=measure)

    def _scale(self, coefficients: NDArray[np.float64]) -> Tensor:
        scale = torch.from_numpy((coefficients / len(coefficients)).astype(np.float32))
        if self.device.type == "cuda":
            scale = scale.pin_memory()
        return scale.to(self.device, non_blocking=True)

    def _backward(
        self, inputs: tuple[Tensor, ...], targets: Tensor, scale: Tensor, *, capture: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of Σ scale · loss; return the losses (B,) and, if captured, the norms (B,)."""
        with capture_norms(self.model) if capture else nullcontext() as captured:
            losses = checked_losses(self.loss, self.model(*inputs), targets, len(scale))
            torch.dot(losses.float(), scale).backward()  # type: ignore[no-untyped-call]
            norms = captured.norms(scale=scale) if captured is not None else None
        if captured is not None:
            self._captures = captured.possible  # a single step may be without norms
        return losses.detach(), norms

    def _backward_halves(self, inputs: tuple[Tensor, ...], targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradient in two halves; return the losses (B,) and the unbiased estimate of ||μ||², 0-d."""
        batch = len(scale)
        small = batch // 2
        first, _ = self._backward(tuple(x[:small] for x in inputs), targets[:small], scale[:small], capture=False)
        half = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        second, _ = self._backward(tuple(x[small:] for x in inputs), targets[small:], scale[small:], capture=False)
        products = [
            torch.dot(one.flatten().float(), (p.grad - one).flatten().float())
            for p, one in zip(self.parameters, half, strict=True)
            if p.grad is not None
        ]
        # each half was scaled by 1/B; its own mean is B/|half| larger
        product = torch.stack(products).sum() * (batch / small) * (batch / (batch - small))
        return torch.cat([first, second]), product

    def _engine_norms(self, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor | None:
        if self._engine is None:
            self._engine = NormEngine(self.model, self.loss)
        try:
            return self._engine(inputs, targets)[0]
        except ModelError as error:
            if not self._warned:
                logger.warning("the learner trains without norms of its own minibatches: %s", error)
            self._warned = True
            return None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint keeps, of model and optimizer, by flat names."""
        flat = {f"model.{name}": t.detach() for name, t in models.state_of(self.model).items()}
        return flat | self.update.tensors()

    def state(self) -> dict[str, Any]:
        """Return the rest as plain JSON."""
        return self.update.state()

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from ``tensors()`` and ``state()``."""
        models.load(self.model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        self.update.restore(tensors, state)


def _reseed(device: torch.device, seed: int) -> None:
    """``torch.manual_seed`` for the device in use only: visiting all others takes 0.3 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _mix(seed: int, step: int) -> int:
    """Return one well-mixed 32-bit seed (torch's CPU generator uses no more bits) for a step of a run."""
    return int.from_bytes(blake2b(b"%d %d" % (seed, step), digest_size=4).digest(), "little")

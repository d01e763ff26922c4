"""One weighted optimizer step, its norms and its share of the variance: torch, no Dask.

Shapes: B examples in the minibatch. A step launches its work and does not wait for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.config import Learning
from dask_isgd.core import models
from dask_isgd.core.loss import Loss
from dask_isgd.errors import ModelError
from dask_isgd.learner.averaging import Averaging
from dask_isgd.learner.gradient_sum import GradientSum
from dask_isgd.learner.shares import share_of
from dask_isgd.learner.step import LaunchedStep, Step
from dask_isgd.learner.update import Update
from dask_isgd.norms import NormEngine, capture_norms, checked_losses

logger = logging.getLogger(__name__)


class Whole(NamedTuple):
    """The global minibatch, of which a rank of a group has a share."""

    size: int
    largest_coefficient: float


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
        exact = any(p.dtype == torch.float64 for p in self.parameters)
        self._dtype = torch.float64 if exact else torch.float32
        """Of the losses and their factors."""
        self._sum: GradientSum | None = None
        self._rank, self._shared = 0, False
        self.averaging: Averaging | None = None
        """Of ranks that take steps of their own; None: they sum their gradients in each step."""
        if learning.sync_every > 1:
            self.averaging = Averaging(
                self.parameters,
                every=learning.sync_every,
                last=learning.steps,
                momentum=learning.outer_momentum,
                rate=learning.outer_rate,
            )
        self._captures = True
        self._engine: NormEngine | None = None
        self._warned = False

    @property
    def waited(self) -> float:
        """Seconds in which this rank waited for others, of all steps."""
        shared = self._sum if self.averaging is None else self.averaging
        return shared.waited if shared is not None else 0.0

    def share(self, rank: int) -> None:
        """Train as rank ``rank`` of the process group from now on."""
        self._rank, self._shared = rank, True
        if self.averaging is None:
            self._sum = GradientSum(self.parameters)
            self.update.gradient_norm.take_afterwards()

    def leave(self) -> None:
        """Train alone again."""
        self._shared = False
        if self._sum is not None:
            self._sum.close()

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
        whole: Whole | None = None,
    ) -> LaunchedStep:
        """Update the parameters with the coefficient-weighted minibatch.

        ``coefficients`` (B,) are 1/(N q) of the draw. With ``norms`` the examples' norms are computed
        in the backward pass if the model allows it. With ``measure`` they are computed in any case, and
        ||μ||² is estimated, without bias if the draws are independent: from the norms of examples and gradient,
        or as the dot product of two halves' gradients if the backward pass cannot compute norms.
        ``indices`` (B,) only name examples in errors.

        In a group, the B examples are this rank's share of the minibatch ``whole``, and its gradient is the sum over
        all ranks: each example's factor is c/M of the whole, so shares may differ in size. Loss and norm of the
        gradient are those of the whole, the examples' norms those of the share. Ranks that average instead take no
        ``whole``: a step is that of the share alone, and some of them end with an average. Raises GroupLostError.

        A step whose loss or gradient is not finite moves nothing, nor does any later one; the result raises
        NonFiniteLossError.
        """
        # Random masks of step k depend on (seed, k) alone, so that a resumed run draws the same ones.
        _reseed(self.device, _mix(self.learning.seed, step, self._rank))
        if self.learning.transform is not None:
            inputs = (self.learning.transform(*inputs),) if len(inputs) == 1 else self.learning.transform(*inputs)
        whole = whole or Whole(len(coefficients), float(coefficients.max()))
        scale = self._scale(coefficients, whole.size)
        for parameter in self.parameters:
            parameter.grad = None
        product = self._nan
        if self._sum is not None:
            self._sum.begin(squares=measure)
        if (norms or measure) and self._captures:
            losses, found = self._backward(inputs, targets, scale, capture=True)
        elif measure and self._sum is None and len(coefficients) > 1:
            found = self._engine_norms(inputs, targets)
            losses, product = self._backward_halves(inputs, targets, scale)
        else:
            found = self._engine_norms(inputs, targets) if measure else None
            losses, _ = self._backward(inputs, targets, scale, capture=False)
        loss = torch.dot(losses.to(scale), scale)
        if self._sum is not None:
            loss, squares = self._sum.finish(loss)
        moved = self.update(loss, whole.largest_coefficient, measure=measure)
        if self._sum is not None and measure:
            # from products of different ranks' gradients, for a minibatch of independent draws
            product = (moved.norm.square() - squares) / _pairs(whole.size, dist.get_world_size())
        if self._shared and self.averaging is not None and self.averaging.is_due(step + 1):
            self.averaging(self.tensors())
        return LaunchedStep(step, (loss, *moved, product), found, losses, coefficients, indices, measured=measure)

    def _scale(self, coefficients: NDArray[np.float64], size: int) -> Tensor:
        scale = torch.from_numpy(coefficients / size).to(self._dtype)
        if self.device.type == "cuda":
            scale = scale.pin_memory()
        return scale.to(self.device, non_blocking=True)

    def _backward(
        self, inputs: tuple[Tensor, ...], targets: Tensor, scale: Tensor, *, capture: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of Σ scale · loss; return the losses (B,) and, if captured, the norms (B,)."""
        with capture_norms(self.model) if capture else nullcontext() as captured:
            losses = checked_losses(self.loss, self.model(*inputs), targets, len(scale))
            torch.dot(losses.to(scale), scale).backward()  # type: ignore[no-untyped-call]
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
        return flat | self.update.tensors() | (self.averaging.tensors() if self.averaging is not None else {})

    def state(self) -> dict[str, Any]:
        """Return the rest as plain JSON."""
        return self.update.state()

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from ``tensors()`` and ``state()``."""
        models.load(self.model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        self.update.restore(tensors, state)
        if self.averaging is not None:
            self.averaging.restore(tensors)


def _reseed(device: torch.device, seed: int) -> None:
    """``torch.manual_seed`` for the device in use only: visiting all others takes 0.3 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _mix(seed: int, step: int, rank: int) -> int:
    """Return one well-mixed 32-bit seed (torch's CPU generator uses no more bits) for a step of a run."""
    text = b"%d %d" % (seed, step) if rank == 0 else b"%d %d %d" % (seed, step, rank)
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little")


def _pairs(size: int, ranks: int) -> float:
    """Return the share of the pairs of ``size`` draws that are on different ranks."""
    shares = (share_of(size, rank, ranks) for rank in range(ranks))
    return 1.0 - float(sum((share.stop - share.start) ** 2 for share in shares)) / size**2

"""One weighted optimizer step, its norms and its share of the variance: torch, no Dask.

Shapes: B examples in the minibatch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.config import Learning
from dask_isgd.core import models
from dask_isgd.core.loss import Loss
from dask_isgd.errors import ModelError, NonFiniteLossError
from dask_isgd.norms import NormEngine, capture_norms, checked_losses
from dask_isgd.sampling.variance import square_of_mean

_MEDIAN_OVER = 101
_MEDIAN_AFTER = 20


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


class Trainer:
    """A model, its optimizer and the weighted update."""

    def __init__(self, model: nn.Module, loss: Loss, learning: Learning) -> None:
        self.device = models.device_of(learning.device)
        self.model = model.to(self.device).train()
        self.loss = loss
        self.learning = learning
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError("model: got no trainable parameter, wanted at least one")
        self.optimizer = make_optimizer(self.parameters, learning)
        self.scheduler = learning.scheduler(self.optimizer) if learning.scheduler is not None else None
        self._captures = True
        self._engine: NormEngine | None = None
        self._recent: deque[float] = deque(maxlen=_MEDIAN_OVER)

    def step(
        self,
        step: int,
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        coefficients: NDArray[np.float64],
        *,
        norms: bool = False,
        measure: bool = False,
        indices: NDArray[np.int64] | None = None,
    ) -> Step:
        """Update the parameters with the coefficient-weighted minibatch.

        ``coefficients`` (B,) are 1/(N q) of the draw. With ``norms`` the examples' norms are computed
        in the backward pass if the model allows it. With ``measure`` they are computed in any case, and
        ||μ||² is estimated, without bias if the draws are independent: from the norms of examples and gradient,
        or as the dot product of two halves' gradients if the backward pass cannot compute norms.
        ``indices`` (B,) only name examples in errors.
        """
        # Random masks of step k depend on (seed, k) alone, so that a resumed run draws the same ones.
        _reseed(self.device, _mix(self.learning.seed, step))
        if self.learning.transform is not None:
            inputs = (self.learning.transform(*inputs),) if len(inputs) == 1 else self.learning.transform(*inputs)
        batch = len(coefficients)
        scale = torch.as_tensor(coefficients / batch, dtype=torch.float32).to(self.device, non_blocking=True)
        capture = (norms or measure) and self._captures
        found = self._engine_norms(inputs, targets) if measure and not capture else None
        self.optimizer.zero_grad(set_to_none=False)
        split = measure and not capture and batch > 1
        halves = (slice(0, batch // 2), slice(batch // 2, batch)) if split else (slice(0, batch),)
        total, parts, first = 0.0, [], None
        for rows in halves:
            named = None if indices is None else indices[rows]
            half = tuple(x[rows] for x in inputs), targets[rows], scale[rows]
            value, part = self._backward(step, *half, named, capture=capture)
            total += value
            parts.append(part)
            if len(halves) == 2 and first is None:
                first = [_gradient(p).clone() for p in self.parameters]
        if capture:
            # None: the model has layers whose norms the backward pass cannot compute
            self._captures = all(part is not None for part in parts)
            found = torch.cat([part for part in parts if part is not None]) if self._captures else None
        known = None if found is None else found.double().cpu().numpy()
        mean_gradient_sq_norm = self._mean_square(first, batch) if first is not None else math.nan
        gradient_norm, clipped = self._clip(step, indices)
        if measure and capture and known is not None:
            mean_gradient_sq_norm = square_of_mean(gradient_norm, coefficients, known)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return Step(total, known, mean_gradient_sq_norm, gradient_norm, clipped)

    def _backward(
        self,
        step: int,
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        scale: Tensor,
        indices: NDArray[np.int64] | None,
        *,
        capture: bool,
    ) -> tuple[float, Tensor | None]:
        with capture_norms(self.model) if capture else nullcontext() as captured:
            losses = checked_losses(self.loss, self.model(*inputs), targets, len(scale))
            weighted = torch.dot(losses.float(), scale)
            value = float(weighted.detach())
            if not math.isfinite(value):
                self._raise_not_finite(step, losses.detach(), indices)
            weighted.backward()  # type: ignore[no-untyped-call]
            return value, captured.norms(scale=scale) if captured is not None else None

    def _raise_not_finite(self, step: int, losses: Tensor, indices: NDArray[np.int64] | None) -> None:
        bad = torch.nonzero(~torch.isfinite(losses)).flatten().cpu().numpy()
        named = bad if indices is None else indices[bad]
        raise NonFiniteLossError(
            f"step {step}: the loss of {len(bad)} of {len(losses)} examples is not finite "
            f"(indices {named[:10].tolist()}{'…' if len(bad) > 10 else ''}); the parameters of this step were neither "
            "published nor checkpointed. Lower the learning rate, clip the gradient (Learning.clip_norm), "
            "or look at those examples"
        )

    def _engine_norms(self, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        if self._engine is None:
            self._engine = NormEngine(self.model, self.loss)
        return self._engine(inputs, targets)[0]

    def _mean_square(self, first: list[Tensor], batch: int) -> float:
        product = 0.0
        for parameter, half in zip(self.parameters, first, strict=True):
            gradient = _gradient(parameter)
            product += float(torch.dot(half.flatten(), (gradient - half).flatten()))
        small = batch // 2  # each half was scaled by 1/B; its own mean is B/|half| larger
        return product * (batch / small) * (batch / (batch - small))

    def _clip(self, step: int, indices: NDArray[np.int64] | None) -> tuple[float, bool]:
        """Return the norm of the gradient before clipping, and whether it was clipped.

        Raises NonFiniteLossError before anything has moved if the norm is not finite.
        """
        absolute, factor = self.learning.clip_norm, self.learning.clip_median_factor
        gradients = [_gradient(p) for p in self.parameters]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            drawn = "" if indices is None else f" (drawn: indices {indices[:10].tolist()}{'…' * (len(indices) > 10)})"
            raise NonFiniteLossError(
                f"step {step}: the loss is finite, its gradient is not{drawn}; the parameters are those of the step "
                "before. Look for a root, a logarithm or a division in loss and model, or lower the learning rate"
            )
        bound = math.inf if absolute is None else absolute
        if factor is not None:
            if len(self._recent) >= _MEDIAN_AFTER:
                bound = min(bound, factor * statistics.median(self._recent))
            self._recent.append(norm)
        if norm > bound:
            torch._foreach_mul_(gradients, bound / norm)
        return norm, norm > bound

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint keeps, of model and optimizer, by flat names."""
        flat = {f"model.{name}": t.detach() for name, t in models.state_of(self.model).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            flat.update(
                (f"optimizer.{index}.{key}", value) for key, value in state.items() if isinstance(value, Tensor)
            )
        return flat

    def state(self) -> dict[str, Any]:
        """Return the rest as plain JSON: hyperparameters, counters, the schedule, recent gradient norms."""
        optimizer = self.optimizer.state_dict()
        plain = {
            str(index): {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for index, state in optimizer["state"].items()
        }
        return {
            "optimizer": {"groups": optimizer["param_groups"], "state": plain},
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "recent": list(self._recent),
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from ``tensors()`` and ``state()``."""
        models.load(self.model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        slots: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"]["state"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["optimizer"]["groups"]})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._recent = deque(state["recent"], maxlen=_MEDIAN_OVER)


def make_optimizer(parameters: list[nn.Parameter], learning: Learning) -> torch.optim.Optimizer:
    """Return the optimizer of a run. Raises ModelError if ``Learning.optimizer`` returns something else."""
    if learning.optimizer is not None:
        optimizer = learning.optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ModelError(f"optimizer: returned {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
        return optimizer
    momentum = learning.momentum
    return torch.optim.SGD(parameters, lr=learning.learning_rate, momentum=momentum, nesterov=momentum > 0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _reseed(device: torch.device, seed: int) -> None:
    """``torch.manual_seed`` for the device in use only: visiting all others takes 0.3 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _mix(seed: int, step: int) -> int:
    """Return one well-mixed 32-bit seed (torch's CPU generator uses no more bits) for a step of a run."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])

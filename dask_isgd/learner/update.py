"""The optimizer's part of a step: clip, refuse what is not finite, move the parameters, advance the schedule.

Nothing here waits for the device. A step whose loss or gradient is not finite must move neither parameters nor
optimizer, although the host learns of it only later: the refusal is a predicate on the device, ``found_inf``. torch's
fused optimizers take it as an attribute, which a ``GradScaler`` sets if ``_step_supports_amp_scaling`` is true
(``torch/amp/grad_scaler.py``); this file does the same, because there is no public way. Any other optimizer is stepped
after the predicate has reached the host. The predicate stays set, so that no later step moves anything either.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dask_isgd.config import Learning
from dask_isgd.errors import ModelError
from dask_isgd.learner.clipping import Clip

logger = logging.getLogger(__name__)


class Moved(NamedTuple):
    """What one update did: scalars on the device."""

    norm: Tensor
    """Norm of the gradient before clipping."""
    clipped: Tensor
    """1 if it was clipped, otherwise 0."""
    refused: Tensor
    """1 if this step or an earlier one was not finite, and nothing moved."""


class Update:
    """The optimizer of ``parameters``, its clipping and its schedule."""

    def __init__(self, parameters: list[nn.Parameter], learning: Learning) -> None:
        self.parameters = parameters
        self.optimizer = _optimizer(parameters, learning)
        self.scheduler = learning.scheduler(self.optimizer) if learning.scheduler is not None else None
        self._clip = Clip(learning.clip_norm, learning.clip_median_factor, parameters[0].device)
        self._refused = torch.zeros((), device=parameters[0].device)
        self.waits = not _takes_predicate(self.optimizer)
        """Whether every step waits for the device, because the optimizer takes no predicate there."""
        if self.waits and self._refused.device.type != "cpu":
            logger.info(
                "each step waits for the device: %s takes no predicate there. Build it with fused=True",
                type(self.optimizer).__name__,
            )

    def __call__(self, loss: Tensor) -> Moved:
        """Move the parameters along their gradients, unless ``loss`` (a scalar) or a gradient is not finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm + loss)
        refused = self._refused = torch.maximum(self._refused, finite.logical_not().float())
        factor = self._clip(norm)
        clipped = torch.zeros_like(norm) if factor is None else (factor < 1).float()
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        if self.waits or not self.optimizer.state:  # the first step makes the optimizer's state
            if not refused:
                self.optimizer.step()
        else:
            optimizer: Any = self.optimizer
            optimizer.found_inf = refused
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf
        if self.scheduler is not None:
            self.scheduler.step()
        return Moved(norm, clipped, refused)

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors by flat names."""
        return {
            f"optimizer.{index}.{key}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def state(self) -> dict[str, Any]:
        """Return the rest as plain JSON: hyperparameters, counters, the schedule, the statistics of clipping."""
        optimizer = self.optimizer.state_dict()
        plain = {
            str(index): {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for index, state in optimizer["state"].items()
        }
        return {
            "optimizer": {"groups": optimizer["param_groups"], "state": plain},
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "clip": self._clip.state(),
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from ``tensors()`` and ``state()``."""
        slots: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"]["state"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["optimizer"]["groups"]})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._clip.restore(state["clip"])


def _optimizer(parameters: list[nn.Parameter], learning: Learning) -> torch.optim.Optimizer:
    if learning.optimizer is not None:
        optimizer = learning.optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ModelError(f"optimizer: returned {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
        return optimizer
    settings: dict[str, Any] = {
        "lr": learning.learning_rate,
        "momentum": learning.momentum,
        "nesterov": learning.momentum > 0,
    }
    try:
        return torch.optim.SGD(parameters, fused=True, **settings)
    except RuntimeError:  # a device or dtype that has no fused kernel
        return torch.optim.SGD(parameters, **settings)


def _takes_predicate(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )

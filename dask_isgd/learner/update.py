"""The optimizer's part of a step: clip, refuse what is not finite, move the parameters, advance the schedule.

Nothing here waits for the device. A step whose loss or gradient is not finite must move neither parameters nor
optimizer, although the host learns of it only later: the refusal is a predicate on the device, ``found_inf``. torch's
fused optimizers take it as an attribute, which a ``GradScaler`` sets if ``_step_supports_amp_scaling`` is true
(``torch/amp/grad_scaler.py``); this file does the same, because there is no public way. Any other optimizer is stepped
after the predicate has reached the host. The predicate stays set, so that no later step moves anything either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dask_isgd.config import Learning
from dask_isgd.errors import ModelError
from dask_isgd.learner.clip_bias import ClipBias
from dask_isgd.learner.clipping import Clipping
from dask_isgd.learner.gradient_norm import GradientNorm
from dask_isgd.learner.rate_schedule import RateSchedule

logger = logging.getLogger(__name__)


class Moved(NamedTuple):
    """What one update did: scalars on the device."""

    norm: Tensor
    """Norm of the gradient before clipping."""
    clipped: Tensor
    """1 if it was clipped, otherwise 0."""
    refused: Tensor
    """1 if this step or an earlier one was not finite, and nothing moved."""
    clip_bias: Tensor
    """Relative bias of clipping at recent measured steps; NaN unless measured."""


class Update:
    """The optimizer of ``parameters``, its clipping and its schedule.

    ``weighted``: whether minibatches are weighted; otherwise the relative bound never applies.
    """

    def __init__(self, parameters: list[nn.Parameter], learning: Learning, *, weighted: bool) -> None:
        self.parameters = parameters
        self.optimizer = make_optimizer(parameters, learning)
        self._set = _arguments(learning).keys() & self.optimizer.param_groups[0].keys()
        self.schedule = RateSchedule(self.optimizer, learning)
        self.rate_factor = 1.0
        """By which the rate of the schedule is multiplied in the next updates."""
        device = parameters[0].device
        self._clipping = Clipping(learning.clip_norm, learning.clip_mean_factor if weighted else None, device)
        self._clip_bias = ClipBias(parameters)
        self.gradient_norm = GradientNorm(parameters)
        self._refused, self._zero, self._one = (torch.tensor(value, device=device) for value in (0.0, 0.0, 1.0))
        self._nan = torch.tensor(torch.nan, device=device)
        self.waits = not _takes_predicate(self.optimizer)
        """Whether every step waits for the device, because the optimizer takes no predicate there."""
        if self.waits and self._refused.device.type != "cpu":
            logger.info(
                "each step waits for the device: %s takes no predicate there. Build it with fused=True",
                type(self.optimizer).__name__,
            )

    def __call__(self, loss: Tensor, largest_coefficient: float, *, measure: bool) -> Moved:
        """Move the parameters along their gradients, unless ``loss`` (0-d) or a gradient is not finite.

        ``largest_coefficient`` is that of the minibatch. ``measure``: estimate the bias of clipping.
        """
        norm = self.gradient_norm()
        sum_of_both = norm + loss
        # NaN differs from itself, and so does the difference of infinities
        self._refused = torch.maximum(self._refused, torch.ne(sum_of_both - sum_of_both, 0.0).float())
        clipped = self._clipping(norm, largest_coefficient)
        divisor = None if clipped is None else clipped.divisor
        bias = self._nan
        if measure:
            self._clip_bias.observe([p.grad for p in self.parameters], self._one if divisor is None else divisor)
            bias = self._clip_bias.value()
        on_host = self.waits or not self.optimizer.state  # the first step makes the optimizer's state
        with self._rates_times(self.rate_factor):
            moved = self._step_on_host(divisor) if on_host else self._step_on_device(divisor)
        if moved:
            self.schedule.step()
        return Moved(norm, self._zero if clipped is None else clipped.clipped, self._refused, bias)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update, of the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"]) * self.rate_factor

    @contextmanager
    def _rates_times(self, factor: float) -> Iterator[None]:
        if factor == 1.0:
            yield
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _step_on_device(self, divisor: Tensor | None) -> bool:
        optimizer: Any = self.optimizer
        optimizer.found_inf = self._refused
        if divisor is not None:
            optimizer.grad_scale = divisor  # the kernel divides by it
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
            if divisor is not None:
                del optimizer.grad_scale
        return True

    def _step_on_host(self, divisor: Tensor | None) -> bool:
        if self._refused:
            return False
        if divisor is not None and divisor > 1.0:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], divisor)
        self.optimizer.step()
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of optimizer and clipping by flat names."""
        slots = self.optimizer.state_dict()["state"]
        return {
            **{
                f"optimizer.{index}.{key}": value
                for index, state in slots.items()
                for key, value in state.items()
                if isinstance(value, Tensor)
            },
            **{f"clipping.{name}": tensor for name, tensor in self._clipping.tensors().items()},
            **{f"clip_bias.{name}": tensor for name, tensor in self._clip_bias.state().items()},
        }

    def state(self) -> dict[str, Any]:
        """Return the rest as plain JSON: hyperparameters, counters and the schedule."""
        optimizer = self.optimizer.state_dict()
        plain = {
            str(index): {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for index, state in optimizer["state"].items()
        }
        return {
            "optimizer": {"groups": optimizer["param_groups"], "state": plain},
            "schedule": self.schedule.state(),
            "clipping": self._clipping.state(),
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from ``tensors()`` and ``state()``."""
        slots: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"]["state"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor
        groups = state["optimizer"]["groups"]
        if not self.schedule.keeps_rate:  # the settings may have changed since
            names = self._set | ({"initial_lr"} if "lr" in self._set else set())
            groups = [
                {**saved, **{name: own[name] for name in names & own.keys()}}
                for own, saved in zip(self.optimizer.param_groups, groups, strict=True)
            ]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.schedule.restore(state["schedule"])
        self._clipping.restore(_within(tensors, "clipping."), state["clipping"])
        self._clip_bias.restore(_within(tensors, "clip_bias."))


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def make_optimizer(parameters: list[nn.Parameter], learning: Learning) -> torch.optim.Optimizer:
    """Return the optimizer of a run. Raises ModelError if ``Learning.optimizer`` returns something else."""
    if learning.optimizer is not None:
        optimizer = learning.optimizer(parameters, **_arguments(learning))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ModelError(f"optimizer: returned {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
        return optimizer
    settings: dict[str, Any] = {**_arguments(learning), "nesterov": bool(learning.momentum)}
    try:
        return torch.optim.SGD(parameters, fused=True, **settings)
    except RuntimeError:  # a device or dtype that has no fused kernel
        return torch.optim.SGD(parameters, **settings)


def _arguments(learning: Learning) -> dict[str, float]:
    """Return the hyperparameters that the settings hold, as torch spells them."""
    given = {"lr": learning.learning_rate, "momentum": learning.momentum}
    return {key: value for key, value in given.items() if value is not None}


def _takes_predicate(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )

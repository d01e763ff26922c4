"""The norms of a training step's own minibatch, from its own backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dask_isgd.errors import ModelError
from dask_isgd.norms.audit import NormPlan, audit
from dask_isgd.norms.capture import Capture
from dask_isgd.norms.engine import structure_of
from dask_isgd.norms.model_state import check_supported, preserved
from dask_isgd.norms.tensor_trees import batch_size, detached, tensors

_PLANS: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], NormPlan | None]] = WeakKeyDictionary()
"""The plan of each model trained under a capture (None: no plan serves it), with the structure it was made for."""


class TrainingNorms:
    """The capture of one training step, from :func:`capture_norms`; it has the norms after the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._plan: NormPlan | None = None
        self._capture: Capture | None = None
        self._handles: list[RemovableHandle] = []
        self._auditing = False

    def norms(self, *, scale: Tensor) -> Tensor | None:
        """Return ||∂L_n/∂θ||₂ of the minibatch just trained on: (B,) float32.

        ``scale`` (B,) is the factor of each example's loss before backward: c_m/M, times a loss
        scale if there is one. None if the backward pass does not yield the norms: a layer has no
        rule, or there was not exactly one forward pass. Use a ``NormEngine`` then.
        """
        capture, plan = self._capture, self._plan
        if capture is None or plan is None:
            return None
        capture.finish()
        size = len(scale)
        if not plan.matches(capture, size):
            return None
        return capture.squares(size, scale.device).sqrt_().div_(scale).abs_().float()

    def _open(self) -> None:
        before = self._model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        self._handles = [before, self._model.register_forward_hook(self._after_forward)]

    def _close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._capture is not None:
            self._capture.close()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._auditing or not torch.is_grad_enabled():  # the audit runs the model too
            return
        if self._capture is None:
            structure, known = structure_of(model), _PLANS.get(model)
            if known is not None and known[0] == structure:
                self._plan = known[1]
            else:
                self._auditing = True
                self._plan = _plan_of(model, structure, args, kwargs)
                self._auditing = False
            if self._plan is None:
                self._close()
                return
            self._capture = Capture(model, self._plan.layers, len(tensors((args, kwargs))[0]))
            self._capture.open()
        self._capture.recording = True

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._capture is not None:
            self._capture.recording = False


@contextmanager
def capture_norms(model: nn.Module) -> Iterator[TrainingNorms]:
    """Capture the examples' gradient norms in one training step: forward and backward run inside.

    ::

        with capture_norms(model) as capture:
            losses = loss(model(inputs), targets)               # (B,)
            torch.dot(losses, coefficients / B).backward()
        norms = capture.norms(scale=coefficients / B)           # (B,) or None

    The training is the same to the bit as without. The first forward pass of a model runs the audit on a
    few of its examples, with a substitute for the loss: the caller must ensure that each example's loss depends on its
    own row of the output only (``NormEngine`` checks it).
    """
    captured = TrainingNorms(model)
    captured._open()
    try:
        yield captured
    finally:
        captured._close()


def _plan_of(
    model: nn.Module, structure: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NormPlan | None:
    """Return the model's plan in its current mode, cached; None if the fast rules do not serve all its parameters."""
    inputs = kwargs if kwargs and not args else args
    plan: NormPlan | None = None
    try:
        if not (args and kwargs) and batch_size(inputs, ()):
            with preserved(model, None):
                check_supported(model)
                plan = audit(model, _row_loss, detached(inputs), ())
    except ModelError:  # the engine, used instead, reports what is wrong
        plan = None
    if plan is not None and not plan.conclusive:
        return None
    if plan is not None and not plan.forward_unchanged:
        plan = None
    _PLANS[model] = structure, plan
    return plan


def _row_loss(output: Any, targets: Any) -> Tensor:
    """Return a loss per example that depends on every element of its output and on nothing else."""
    parts = []
    for tensor in tensors(output):
        if tensor.is_floating_point():
            rows = tensor.reshape(len(tensor), -1).float()
            parts.append(rows @ torch.linspace(0.5, 1.5, rows.shape[1], device=rows.device))
    if not parts:
        raise ModelError(f"got an output without a floating-point tensor ({type(output).__name__}), wanted one")
    return torch.stack(parts).sum(0)

"""The norms of a training step's own minibatch, from its own backward pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dask_isgd.norms.capture import Capture
from dask_isgd.norms.graph_reader import GraphReader
from dask_isgd.norms.later_batches import CheckSchedule, nodes_created
from dask_isgd.norms.model_state import structure_of
from dask_isgd.norms.norm_plan import NormPlan
from dask_isgd.norms.tensor_trees import tensors
from dask_isgd.norms.training_plan import training_plan

logger = logging.getLogger("dask_isgd.norms")


@dataclass
class _Trained:
    """What is known of a model that is trained under captures."""

    structure: tuple[Any, ...]
    plan: NormPlan | None
    """None if no plan serves the model."""
    reason: str
    schedule: CheckSchedule = field(default_factory=CheckSchedule)
    seconds: float = 0.0
    """Duration of the latest step, from its forward pass to its norms."""


_TRAINED: WeakKeyDictionary[nn.Module, _Trained] = WeakKeyDictionary()


class TrainingNorms:
    """The capture of one training step, from :func:`capture_norms`; it has the norms after the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trained: _Trained | None = None
        self._plan: NormPlan | None = None
        self._capture: Capture | None = None
        self._reader: GraphReader | None = None
        self._handles: list[RemovableHandle] = []
        self._auditing = False
        self._start = 0.0
        self._nodes = 0
        self._inputs: Any = None
        self.reason = "there was no forward pass with gradients enabled"
        """Why :meth:`norms` returned None; empty if it did not."""
        self.possible = True
        """Whether other steps of this model may yield norms."""

    def norms(self, *, scale: Tensor) -> Tensor | None:
        """Return ||∂L_n/∂θ||₂ of the minibatch just trained on: (B,) float32, on the device of ``scale``.

        ``scale`` (B,) is the factor of each example's loss before backward: c_m/M, times a loss
        scale if there is one. None if the backward pass does not yield the norms (``reason`` is why): a layer has
        no rule, or there was not exactly one forward pass. Use a ``NormEngine`` then.
        """
        capture, plan, trained = self._capture, self._plan, self._trained
        if capture is None or plan is None or trained is None:
            return None
        trained.seconds = time.perf_counter() - self._start
        capture.finish()
        size = len(scale)
        shared = self._reader.squares() if self._reader is not None else []
        if shared is None or not plan.matches(capture, size):
            failed = self._reader.failed if self._reader is not None else {}
            why = "".join(f"; {name}: {reason}" for name, reason in list(failed.items())[:1])
            self.reason = f"the step did not make the forward and backward pass that the audit proved{why}"
            return None
        if trained.schedule.due(self._nodes):
            self._check(trained, size)
        if trained.plan is not plan or not trained.schedule.flows.get(self._nodes, False):
            self.reason = "the audit, repeated on this batch, has another result"
            return None
        self.reason = ""
        squares = capture.squares(size, scale.device)
        for square in shared:
            squares += square.to(squares)
        return squares.sqrt_().div_(scale).abs_().float()

    def _check(self, trained: _Trained, size: int) -> None:
        """Repeat the audit on this batch: on a few of its examples, or on all if their control flow is new."""
        schedule, start = trained.schedule, time.perf_counter()
        known = self._nodes in schedule.flows
        rows = torch.randperm(size, generator=schedule.generator) if known else None
        self._auditing = True
        plan, reason = training_plan(self._model, self._inputs, rows=rows, whole=not known)
        self._auditing = False
        schedule.checked(time.perf_counter() - start, trained.seconds)
        if plan is not None and not plan.conclusive:
            return
        same = plan is not None and trained.plan is not None and plan.same_as(trained.plan)
        if not known:
            schedule.flows[self._nodes] = same
        elif not same:
            trained.plan, trained.reason = plan, reason
        if not same:
            kind = "with another control flow" if not known else "with other data"
            logger.warning("%s: a training step %s needs another plan of norms", type(self._model).__name__, kind)

    def _open(self) -> None:
        if isinstance(self._model, torch.jit.ScriptModule):  # takes no hooks
            self.possible, self.reason = False, "the model is scripted, and torch runs it outside Python"
            return
        before = self._model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        self._handles = [before, self._model.register_forward_hook(self._after_forward)]

    def _close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._capture is not None:
            self._capture.close()
        if self._reader is not None:
            self._reader.close()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._auditing or not torch.is_grad_enabled():  # the audit runs the model too
            return
        if self._capture is None:
            self._inputs = args if not kwargs else kwargs if not args else None
            self._trained = self._known(model)
            self._plan, self.reason = self._trained.plan, self._trained.reason
            self.possible = self._plan is not None
            if self._plan is None:
                self._close()
                return
            self._start = time.perf_counter()
            self._capture = Capture(model, self._plan.layers, len(tensors((args, kwargs))[0]))
            self._capture.open()
            if self._plan.shared:
                self._reader = GraphReader(model, self._plan.shared, self._capture.size)
        self._capture.recording = True
        self._nodes -= nodes_created()

    def _known(self, model: nn.Module) -> _Trained:
        structure, trained = structure_of(model), _TRAINED.get(model)
        if trained is None or trained.structure != structure:
            self._auditing = True
            plan, reason = training_plan(model, self._inputs)
            self._auditing = False
            if plan is None:
                logger.warning(
                    "%s: training steps yield no norms of their minibatches: %s", type(model).__name__, reason
                )
            trained = _Trained(structure, plan, reason)
            if plan is None or plan.conclusive:
                _TRAINED[model] = trained
            else:
                trained.plan, trained.reason = None, "the losses are not finite"
        return trained

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._capture is not None and self._capture.recording:
            self._capture.recording = False
            self._nodes += nodes_created()
            if self._reader is not None:
                self._reader.find(tensors(output))


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

"""Exact gradient norms of each example, at the cost of about a forward and half a backward pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ConfigError, ModelError
from dask_isgd.norms.audit import audit
from dask_isgd.norms.capture import fast_pass
from dask_isgd.norms.coupling import agree, mixes_rows, same_losses
from dask_isgd.norms.fallback import parameter_squares, squares_by_loop, squares_by_vmap
from dask_isgd.norms.later_batches import CheckSchedule
from dask_isgd.norms.model_state import (
    as_written,
    check_supported,
    preserved,
    random_state,
    set_random_state,
    structure_of,
    trainable,
    without,
)
from dask_isgd.norms.norm_plan import NormPlan
from dask_isgd.norms.recurrent import composed_recurrence
from dask_isgd.norms.tensor_trees import (
    Loss,
    batch_size,
    call,
    checked_losses,
    detached,
    first_line,
    on_tensors,
    square_norms,
    take,
    tensors,
)

logger = logging.getLogger("dask_isgd.norms")

ODD_BATCHES = 3
"""Batches whose graph cannot be read, though an audit has just found how, until no graph is read any more."""
METHODS = ("exact", "bound", "loss")


class NormEngine:
    """Computes per-example norms of one model, batch after batch; the audit runs on the first batch.

    ``method``: ``"exact"``, ||∂L_n/∂θ||₂ over all trainable parameters; ``"bound"``, the norm of the
    gradient with respect to the model's output, forward only for the body (Katharopoulos and Fleuret
    2018, arXiv 1803.00942); ``"loss"``, the loss itself, at least 0. ``train_mode``: whether the model
    runs in train mode, with dropout drawn from a copy of the random state. ``micro_batch``: the largest
    number of examples at once. ``ignore``: names of parameters, with wildcards (``"*.bias"``), that the exact norm
    omits, such as a few that no rule serves.

    The plan stays in use while the model's layers, its parameters, and which of them are trainable stay the same.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        method: str = "exact",
        train_mode: bool = False,
        micro_batch: int | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"method: got {method!r}, wanted one of {', '.join(map(repr, METHODS))}")
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch: got {micro_batch!r}, wanted a whole number at least 1 or None")
        if ignore and method != "exact":
            raise ConfigError(f"ignore: got {ignore!r} with method={method!r}, wanted method='exact'")
        self.attach(model, loss)
        self.method = method
        self.train_mode = train_mode
        self.micro_batch = micro_batch
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.plan: NormPlan | None = None
        """The result of the audit; None before the first batch."""
        self._structure: tuple[Any, ...] = ()
        self._compared: set[tuple[torch.Size, ...]] = set()
        self._schedule = CheckSchedule()
        self._reported = False
        self._reads = True
        self._odd_batches = 0

    def attach(self, model: nn.Module, loss: Loss) -> None:
        """Compute the norms of this model and this loss from now on."""
        self.model: nn.Module = as_written(model)
        self.loss = loss

    def detach(self) -> None:
        """Release model and loss, and keep the plan."""
        del self.model, self.loss

    def __call__(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return norms and losses of a batch: (B,) float32 each, on the device of the losses.

        The model is unchanged afterwards, also after an exception. Raises ModelError for a loss that
        is not one per example and for models that couple the examples of a batch.
        """
        size = batch_size(inputs, targets)
        if size == 0:
            empty = torch.zeros(0, device=tensors(inputs)[0].device)
            return empty, empty.clone()
        step = self.micro_batch or size
        with preserved(self.model, self.train_mode), without(self.model, self.ignore):
            check_supported(self.model)
            inputs, targets = detached(inputs), detached(targets)
            parts = [
                self._micro(take(inputs, rows), take(targets, rows), min(size - rows.start, step))
                for rows in (slice(start, start + step) for start in range(0, size, step))
            ]
        squares, losses = (torch.cat(column) for column in zip(*parts, strict=True))
        return squares.sqrt().float() if self.method != "loss" else squares.float(), losses.float()

    def _micro(self, inputs: Any, targets: Any, size: int) -> tuple[Tensor, Tensor]:
        if self.method == "exact":
            return self._exact(inputs, targets, size)
        with torch.no_grad():
            output = call(self.model, inputs)
        if self.method == "loss":
            with torch.no_grad():
                losses = checked_losses(self.loss, output, targets, size)
            return losses.clamp_min(0), losses
        return self._bound(output, targets, size)

    def _bound(self, output: Any, targets: Any, size: int) -> tuple[Tensor, Tensor]:
        output = on_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, output)
        points = [tensor for tensor in tensors(output) if tensor.requires_grad]
        for point in points:
            if point.ndim == 0 or point.shape[0] != size:
                raise ModelError(f"the model's output has shape {tuple(point.shape)}, wanted the batch of {size} first")
        losses = checked_losses(self.loss, output, targets, size)
        if not losses.requires_grad:
            raise ModelError("the loss does not depend on the model's output, or cuts the graph; wanted one that does")
        gradients = torch.autograd.grad(losses, points, torch.ones_like(losses), allow_unused=True)
        squares = torch.stack([square_norms(gradient) for gradient in gradients if gradient is not None]).sum(0)
        return squares, losses.detach()

    def _exact(self, inputs: Any, targets: Any, size: int) -> tuple[Tensor, Tensor]:
        if size == 1 and self.plan is not None and self.plan.shared:
            # Torch multiplies a single row in another way, and the graph is not the one that the audit found.
            twice = torch.zeros(2, dtype=torch.long)
            squares, losses = self._exact(take(inputs, twice), take(targets, twice), 2)
            return squares[:1], losses[:1]
        if not self._reads and self._odd_batches < ODD_BATCHES:
            self.plan, self._reads = None, True  # this batch may be like those before the odd one
        rows: Tensor | None = None
        with composed_recurrence(self.model):
            for attempt in range(3):
                start, before = time.perf_counter(), random_state(self.model)
                found = self._by_plan(inputs, targets, size, rows=rows)
                if found is None:  # another model, or control flow that the audit did not meet
                    self.plan = None
                    if attempt and self._reads:
                        self._reads, self._odd_batches = False, self._odd_batches + 1
                    continue
                squares, losses, nodes = found
                if not self._schedule.flows.get(nodes, True):
                    break
                if rows is None and not self._schedule.due(nodes):
                    return squares, losses
                seconds = time.perf_counter() - start
                k = self._schedule.example(size) if rows is None else int(rows[0])
                wrong = self._mismatch(k, inputs, targets, float(squares[k]), before)
                self._schedule.checked(time.perf_counter() - start - seconds, seconds)
                self._schedule.flows[nodes] = wrong is None
                if wrong is None:
                    return squares, losses
                self._report(wrong)
                rows, self.plan = (torch.arange(size) + k) % size, None
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return squares_by_loop(self.model, self.loss, inputs, targets, names)

    def _mismatch(self, k: int, inputs: Any, targets: Any, got: float, before: list[Tensor]) -> str | None:
        """Return how the square of example k differs from autograd's, if it does."""
        plan = self.plan
        assert plan is not None
        if not plan.deterministic and plan.fallback:
            return None  # its random numbers are drawn, and gone
        if plan.deterministic:
            one = slice(k, k + 1)
            wanted = squares_by_loop(
                self.model, self.loss, take(inputs, one), take(targets, one), list(trainable(self.model))
            )[0][0]
        else:
            set_random_state(self.model, before)
            losses = checked_losses(self.loss, call(self.model, inputs), targets, batch_size(inputs, targets))
            wanted = parameter_squares(losses[k], list(trainable(self.model).values())).sum()
        if agree(got, float(wanted), inputs, self.model, floor=1e-36):
            return None
        plan_norm, norm = got**0.5, float(wanted) ** 0.5
        return f"example {k} of a later batch has norm {plan_norm:.6g} by the plan and {norm:.6g} by autograd"

    def _report(self, reason: str) -> None:
        if not self._reported:
            logger.warning(
                "%s: %s: its control flow or its data differ from those of the audit, which is repeated; a batch that "
                "fails again is computed one example at a time",
                type(self.model).__name__,
                reason,
            )
        self._reported = True

    def _by_plan(
        self, inputs: Any, targets: Any, size: int, *, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, int] | None:
        """Return squares, losses and the graph nodes of the pass; None if it did not follow the plan.

        The plan is made first if there is none, on the examples ``rows``.
        """
        structure = (*structure_of(self.model), *(tensor.ndim for tensor in tensors((inputs, targets))))
        if structure != self._structure:
            self._reads, self._odd_batches = True, 0
        if self.plan is None or not self.plan.conclusive or structure != self._structure:
            before = random_state(self.model)
            with torch.no_grad():  # errors concern the user's batch, not the audit's
                checked_losses(self.loss, call(self.model, inputs), targets, size)
            self.plan = audit(self.model, self.loss, inputs, targets, rows=rows, reads=self._reads)
            if structure != self._structure:
                self._schedule = CheckSchedule()
            self._structure = structure
            self._compared.clear()
            set_random_state(self.model, before)
        plan = self.plan
        squares: Tensor | None = None
        losses: Tensor | None = None
        nodes = 0
        if plan.layers or plan.copies or plan.shared:
            found = self._by_fast_pass(plan, inputs, targets, size)
            if found is None:
                return None
            squares, losses, nodes = found
        if plan.fallback:
            slow, slow_losses = self._by_fallback(plan, inputs, targets)
            squares = slow if squares is None else squares + slow
            losses = slow_losses if losses is None else losses
        assert squares is not None
        assert losses is not None
        return squares, losses, nodes

    def _by_fallback(self, plan: NormPlan, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        if plan.by_vmap:
            before = random_state(self.model)
            try:
                return squares_by_vmap(self.model, self.loss, inputs, targets, plan.fallback)
            except Exception as error:  # vmap may raise anything; the loop has none of its restrictions
                set_random_state(self.model, before)
                self.plan = replace(plan, by_vmap=False)
                logger.warning(
                    "%s: vmap, which the audit had found to work, fails (%s: %s); the norms are computed by a loop",
                    type(self.model).__name__,
                    type(error).__name__,
                    first_line(error),
                )
        return squares_by_loop(self.model, self.loss, inputs, targets, plan.fallback)

    def _by_fast_pass(self, plan: NormPlan, inputs: Any, targets: Any, size: int) -> tuple[Tensor, Tensor, int] | None:
        before = random_state(self.model)
        try:
            capture, losses = fast_pass(
                self.model, self.loss, inputs, targets, plan.layers, plan.copies, size, shared=plan.shared
            )
            after = random_state(self.model)
            if not plan.matches(capture, size):
                return None
            if plan.copies and not self._examples_apart(plan, inputs, targets, losses, before):
                return None
        except Exception:  # a model may raise anything at copies that it does not expect
            if not plan.copies:
                raise
            return None
        set_random_state(self.model, after)
        return capture.squares(size, losses.device), losses, capture.nodes

    def _examples_apart(self, plan: NormPlan, inputs: Any, targets: Any, losses: Tensor, before: list[Tensor]) -> bool:
        """Return whether a pass with copies keeps the model's losses and the examples apart.

        Copies may broadcast differently for these shapes than for the audit's: checked once per set of shapes.
        """
        shapes = tuple(tensor.shape for tensor in tensors((inputs, targets)))
        if shapes in self._compared:
            return True
        size = len(losses)
        set_random_state(self.model, before)
        with torch.no_grad():
            plain = checked_losses(self.loss, call(self.model, inputs), targets, size)
        set_random_state(self.model, before)
        last, _ = fast_pass(self.model, self.loss, inputs, targets, plan.layers, plan.copies, size, only=size - 1)
        if not same_losses(losses, plain, inputs, self.model):
            return False
        if any(mixes_rows(term, size - 1) for term in last.terms.values()):
            return False
        self._compared.add(shapes)
        return True

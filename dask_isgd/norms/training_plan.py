"""How the norms of a model's training steps are computed: by the rules, and read off the graph for what is shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.audit import CHOSEN, NormPlan, audit
from dask_isgd.norms.model_state import check_supported, is_compiled, preserved
from dask_isgd.norms.shared_terms import find_shared
from dask_isgd.norms.tensor_trees import batch_size, detached, take, tensors
from dask_isgd.norms.training_graph import SharedTerm


@dataclass(frozen=True)
class TrainingPlan:
    """The layers that rules serve, and what is read off the graph."""

    layers: NormPlan
    shared: tuple[SharedTerm, ...] = ()

    def same_as(self, other: TrainingPlan) -> bool:
        """Return whether two audits came to the same result."""
        return self.layers.same_as(other.layers) and self.shared == other.shared


def training_plan(
    model: nn.Module, inputs: Any, *, rows: Tensor | None = None, whole: bool = False
) -> tuple[TrainingPlan | None, str]:
    """Return the plan of the model in its current mode, or None and why a training step does not yield its norms.

    ``rows`` and ``whole`` are those of :func:`audit`.
    """
    if is_compiled(model):
        return None, "the model is compiled, and hooks of its layers do not run in compiled code"
    try:
        if inputs is None or not batch_size(inputs, ()):
            return None, "the model is called with positional and named inputs, or with none"
        with preserved(model, None):
            check_supported(model)
            inputs = detached(inputs)
            plan = audit(model, row_loss, inputs, (), rows=rows, whole=whole, training=True)
            if plan.forward_unchanged or not plan.conclusive:
                return TrainingPlan(plan), ""
            return _with_shared(model, plan, inputs, rows)
    except ModelError as error:  # the engine, used instead, reports what is wrong
        return None, str(error)


def row_loss(output: Any, targets: Any) -> Tensor:
    """Return a loss per example that depends on every element of its output and on nothing else."""
    parts = []
    for tensor in tensors(output):
        if tensor.is_floating_point():
            rows = tensor.reshape(len(tensor), -1).float()
            parts.append(rows @ torch.linspace(0.5, 1.5, rows.shape[1], device=rows.device))
    if not parts:
        raise ModelError(f"got an output without a floating-point tensor ({type(output).__name__}), wanted one")
    return torch.stack(parts).sum(0)


def _with_shared(model: nn.Module, plan: NormPlan, inputs: Any, rows: Tensor | None) -> tuple[TrainingPlan | None, str]:
    """Return the plan with every parameter that no rule serves read off the graph, if autograd agrees."""
    given = torch.arange(len(tensors(inputs)[0])) if rows is None else rows
    inputs = take(inputs, given[torch.arange(plan.size) % len(given)])
    layers = [layer for layer in plan.layers if layer.layout.shared]
    names = [name for name in plan.fallback if plan.reasons[name] != CHOSEN]
    terms = find_shared(model, row_loss, inputs, (), plan.size, names, layers)
    served = {name for term in terms for name in (term.name, *term.names)}
    missing = [name for name in (*plan.fallback, *(layer.name for layer in layers)) if name not in served]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        listed = "; ".join(f"{name}: {plan.reasons[name]}" if name in plan.reasons else name for name in missing[:4])
        return None, f"the backward pass of a training step has no norms of {listed}{more}"
    read = {layer.name for layer in layers}
    kept = [number for number, (layer, _) in enumerate(plan.calls) if layer not in read]
    ruled = replace(
        plan,
        layers=tuple(layer for layer in plan.layers if not layer.layout.shared),
        calls=tuple(plan.calls[number] for number in kept),
        arrived=frozenset(new for new, number in enumerate(kept) if number in plan.arrived),
        fallback=(),
        reasons={},
    )
    return TrainingPlan(ruled, terms), ""

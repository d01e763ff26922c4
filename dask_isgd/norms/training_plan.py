"""How the norms of a model's training steps are computed: by the rules, and read off the graph for what is shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.audit import audit
from dask_isgd.norms.model_state import check_supported, is_compiled, preserved
from dask_isgd.norms.norm_plan import NormPlan
from dask_isgd.norms.tensor_trees import batch_size, detached, tensors


def training_plan(
    model: nn.Module, inputs: Any, *, rows: Tensor | None = None, whole: bool = False
) -> tuple[NormPlan | None, str]:
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
    except ModelError as error:  # the engine, used instead, reports what is wrong
        return None, str(error)
    if plan.forward_unchanged or not plan.conclusive:
        return plan, ""
    more = f" and {len(plan.fallback) - 4} more" if len(plan.fallback) > 4 else ""
    listed = "; ".join(f"{name}: {plan.reasons[name]}" for name in plan.fallback[:4])
    return None, f"the backward pass of a training step has no norms of {listed}{more}"


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

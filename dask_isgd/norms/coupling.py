"""Examples that depend on each other have no gradient of their own: found out, and refused."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.tensor_trees import Loss, autocast_on, call, checked_losses, take, tensors, with_tensors

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative; half precision: 0.1. A wrong rule is off by far more, rounding by far less."""


def mixes_rows(gradient: Tensor, k: int) -> bool:
    """Whether a gradient of example k's loss reaches other rows than row k; (B, ...)."""
    others = torch.cat([gradient[:k], gradient[k + 1 :]])
    return bool(((others != 0) & ~others.isnan()).any())


def refuse_mixed_inputs(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> None:
    """ModelError if one example's loss has a gradient with respect to another example."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors(inputs)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    size = len(leaves[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            losses = checked_losses(loss, call(model, with_tensors(inputs, leaves)), targets, size)
        except (RuntimeError, TypeError):
            return  # a model that handles its inputs as mere numbers, say through numpy
    if not wanted or not losses.requires_grad:
        return
    for gradient in torch.autograd.grad(losses[size - 1], wanted, allow_unused=True):
        if gradient is not None and mixes_rows(gradient, size - 1):
            raise coupled("one example's loss has a gradient with respect to another example")


def refuse_changed_losses(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, losses: Tensor, spots: list[int]
) -> None:
    """ModelError if two examples have other losses in a batch of their own."""
    rows = torch.tensor(spots)
    with torch.no_grad():
        apart = checked_losses(loss, call(model, take(inputs, rows)), take(targets, rows), len(spots))
    scale = float(losses.abs().nan_to_num(0, 0, 0).max())
    for k, value in zip(spots, apart.tolist(), strict=True):
        if not close(value, float(losses[k]), inputs, model, floor=1e-3 * scale):
            raise coupled(f"an example's loss is {float(losses[k]):.6g} in one batch and {value:.6g} in another")


def coupled(found: str) -> ModelError:
    return ModelError(
        f"got a model or a loss that couples the examples of a batch ({found}): no example has a gradient of its own. "
        "Wanted a loss of each example that depends on nothing else in the batch: take out statistics over the "
        "batch (batch normalisation in train mode, contrastive or in-batch terms)"
    )


def close(got: float, wanted: float, inputs: Any, model: nn.Module, *, floor: float = 0.0) -> bool:
    """Whether two numbers agree to what the dtype can tell, squares at that; non-finite agrees with non-finite."""
    if not (abs(got) < float("inf") and abs(wanted) < float("inf")):
        return not (abs(got) < float("inf")) and not (abs(wanted) < float("inf"))
    return abs(got - wanted) <= 2 * tolerance(inputs, model) * abs(wanted) + floor


def same_losses(got: Tensor, wanted: Tensor, inputs: Any, model: nn.Module) -> bool:
    """Whether two ways of computing the same losses agree to rounding, relative to the largest."""
    got, wanted = got.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0)
    return bool((got - wanted).abs().max() <= 0.02 * tolerance(inputs, model) * wanted.abs().max())


def tolerance(inputs: Any, model: nn.Module) -> float:
    """Relative, for what a model computes: by the coarsest dtype of its parameters, its inputs and autocast."""
    found = [*model.parameters(), *tensors(inputs)]
    dtypes = {tensor.dtype for tensor in found if tensor.is_floating_point()}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in {t.device.type for t in found} if autocast_on(kind)}
    return max((TOLERANCE.get(dtype, 0.1) for dtype in dtypes), default=1e-3)

"""Examples that depend on each other have no gradient of their own: such models are detected and refused."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.model_state import random_state, set_random_state
from dask_isgd.norms.parameter_uses import Graph
from dask_isgd.norms.tensor_trees import Loss, autocast_on, call, checked_losses, take, tensors, with_tensors

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative; half precision: 0.1. A wrong rule deviates by far more, rounding by far less."""


def mixes_rows(gradient: Tensor, k: int) -> bool:
    """Return whether a gradient (B, ...) of example k's loss reaches other rows than row k."""
    others = torch.cat([gradient[:k], gradient[k + 1 :]])
    return bool(((others != 0) & ~others.isnan()).any())


def check_inputs_independent(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> None:
    """Raise ModelError if one example's loss has a gradient with respect to another example."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors(inputs)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    size = len(leaves[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            losses = checked_losses(loss, call(model, with_tensors(inputs, leaves)), targets, size)
        except (RuntimeError, TypeError):
            return  # a model that treats its inputs as plain numbers, for example through numpy
    if not wanted or not losses.requires_grad:
        return
    Graph(losses)  # refuses checkpoints that enter a graph only if their inputs require gradients
    for gradient in torch.autograd.grad(losses[size - 1], wanted, allow_unused=True):
        if gradient is not None and mixes_rows(gradient, size - 1):
            raise coupling_error("one example's loss has a gradient with respect to another example")


def check_losses_independent(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, losses: Tensor, examples: list[int]
) -> None:
    """Raise ModelError if the losses of ``examples`` change when these examples form a batch of their own."""
    rows = torch.tensor(examples)
    with torch.no_grad():
        apart = checked_losses(loss, call(model, take(inputs, rows)), take(targets, rows), len(examples))
    scale = float(losses.abs().nan_to_num(0, 0, 0).max())
    for k, value in zip(examples, apart.tolist(), strict=True):
        if not agree(value, float(losses[k]), inputs, model, floor=1e-3 * scale):
            raise coupling_error(f"an example's loss is {float(losses[k]):.6g} in one batch and {value:.6g} in another")


def check_others_irrelevant(model: nn.Module, loss: Loss, inputs: Any, targets: Any, k: int) -> None:
    """Raise ModelError if the loss of example k changes when all others become copies of it.

    Random numbers are the same in both passes, and dropout layers are off; shapes are the same, so that little rounding
    is in the way.
    """
    size = len(tensors(inputs)[0])
    before, values = random_state(model), []
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    try:
        for dropout in dropouts:
            dropout.training = False
        for rows in (torch.arange(size), torch.full((size,), k)):
            set_random_state(model, before)
            with torch.no_grad():
                losses = checked_losses(loss, call(model, take(inputs, rows)), take(targets, rows), size)
            values.append(float(losses[k]))
    finally:
        for dropout in dropouts:
            dropout.training = True
    wanted, got = values
    if not agree(got, wanted, inputs, model, share=0.02):
        raise coupling_error(f"an example's loss is {wanted:.6g} among others and {got:.6g} among copies of itself")


def coupling_error(reason: str) -> ModelError:
    """Return the error for a model or a loss that couples examples."""
    return ModelError(
        f"got a model or a loss that couples the examples of a batch ({reason}): no example has a gradient of its "
        "own. Wanted a loss of each example that depends on nothing else in the batch: remove statistics over the "
        "batch (batch normalisation in train mode, contrastive or in-batch terms)"
    )


def agree(got: float, wanted: float, inputs: Any, model: nn.Module, *, floor: float = 0.0, share: float = 1.0) -> bool:
    """Return whether two squares agree within (a share of) the dtype's tolerance; any two non-finite numbers agree."""
    if not (abs(got) < float("inf") and abs(wanted) < float("inf")):
        return not (abs(got) < float("inf")) and not (abs(wanted) < float("inf"))
    return abs(got - wanted) <= 2 * share * tolerance(inputs, model) * abs(wanted) + floor


def same_losses(got: Tensor, wanted: Tensor, inputs: Any, model: nn.Module) -> bool:
    """Return whether two ways of computing the same losses agree to rounding, relative to the largest."""
    got, wanted = got.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0)
    return bool((got - wanted).abs().max() <= 0.02 * tolerance(inputs, model) * wanted.abs().max())


def tolerance(inputs: Any, model: nn.Module) -> float:
    """Return the relative tolerance, by the coarsest dtype of the model's parameters, its inputs and autocast."""
    found = [*model.parameters(), *tensors(inputs)]
    dtypes = {tensor.dtype for tensor in found if tensor.is_floating_point()}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in {t.device.type for t in found} if autocast_on(kind)}
    return max((TOLERANCE.get(dtype, 0.1) for dtype in dtypes), default=1e-3)

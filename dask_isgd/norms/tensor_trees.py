"""Inputs, targets and losses, example by example.

Inputs are a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``), outputs also dataclasses; every
tensor inside has the batch first, anything else is passed on unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, target)``: one loss per example, shape (B,)."""


def on_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return ``value`` with every tensor in it replaced by ``function(tensor)``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: on_tensors(function, item) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        other = copy.copy(value)  # a library's own output type, with attributes of the same names
        for key, item in items.items():
            other[key] = item
        return other
    if isinstance(value, (tuple, list)):
        elements = [on_tensors(function, item) for item in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*elements)
        return elements if isinstance(value, list) else tuple(elements)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(changed, field.name, on_tensors(function, getattr(value, field.name)))
        return changed
    return value


def tensors(value: Any) -> list[Tensor]:
    """Return every tensor in ``value``, in the order of :func:`on_tensors`."""
    found: list[Tensor] = []
    on_tensors(found.append, value)
    return found


def with_tensors(value: Any, leaves: list[Tensor] | tuple[Tensor, ...]) -> Any:
    """Return ``value`` with its tensors replaced, in order, by ``leaves``."""
    remaining = iter(leaves)
    return on_tensors(lambda _: next(remaining), value)


def take(value: Any, rows: Tensor | slice) -> Any:
    """Return the examples ``rows`` of ``value``."""
    return on_tensors(lambda tensor: tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows], value)


def detached(value: Any) -> Any:
    """Return ``value`` detached from any graph; inference tensors are copied, because autograd cannot save them."""
    return on_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor.detach(), value)


def batch_size(inputs: Any, targets: Any) -> int:
    """Return B, the common length of every tensor of inputs and targets."""
    leading = [(kind, t) for kind, value in (("inputs", inputs), ("targets", targets)) for t in tensors(value)]
    if not any(kind == "inputs" for kind, _ in leading):
        raise ModelError(
            f"got {type(inputs).__name__} inputs without a tensor, wanted tensors that have the batch first"
        )
    size = leading[0][1].shape[0] if leading[0][1].ndim else None
    for kind, tensor in leading:
        if tensor.ndim == 0 or tensor.shape[0] != size:
            raise ModelError(
                f"got {kind} of shape {tuple(tensor.shape)}, wanted the batch of {size} first in every tensor; "
                "store what the examples share in the model"
            )
    assert size is not None
    return size


def call(model: nn.Module, inputs: Any) -> Any:
    """Return the model's output for a batch. The model gets copies: it may modify its inputs, and is run again."""
    inputs = on_tensors(torch.clone, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def checked_losses(loss: Loss, output: Any, targets: Any, size: int) -> Tensor:
    """Return one loss per example, shape (``size``,); ModelError for anything else."""
    try:
        losses = loss(output, targets)
    except (IndexError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the loss fails on {shapes_of(output, targets)}: {error}. Has the model one output per class?"
        ) from error
    if not isinstance(losses, Tensor):
        raise ModelError(f"the loss returned {type(losses).__name__}, wanted a tensor of shape ({size},)")
    if losses.shape != (size,) or not losses.is_floating_point():
        raise ModelError(
            f"the loss returned shape {tuple(losses.shape)} and {losses.dtype}, wanted one floating-point loss per "
            f"example, shape ({size},), from {shapes_of(output, targets)}. Use reduction='none' and, if an "
            "example has several terms, sum or average over all dimensions but the first"
        )
    return losses


def shapes_of(output: Any, targets: Any) -> str:
    """Return the shapes of a model's output and of the targets, in words."""

    def shown(value: Any) -> str:
        found = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors(value))
        return ", ".join(found) or type(value).__name__

    return f"an output of shape {shown(output)} and targets of shape {shown(targets)}"


def square_norms(rows: Tensor) -> Tensor:
    """Return ||row||² over all dimensions but the first: (B, ...) -> (B,) float64 (float32 if the device has none)."""
    return row_norms(rows).to(wide(rows)).square()


def row_norms(rows: Tensor) -> Tensor:
    """Return ||row|| over all dimensions but the first: (B, ...) -> (B,) float32 or wider."""
    single = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else None
    norms: Tensor = torch.linalg.vector_norm(
        rows if rows.ndim == 2 else rows.flatten(1) if rows.ndim > 1 else rows[:, None], dim=1, dtype=single
    )
    return norms


def autocast_on(kind: str) -> bool:
    """Return whether operations on devices of this kind are autocast."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which squares are summed: squares of small norms leave the range of float32."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return (str(error).splitlines() or [""])[0]

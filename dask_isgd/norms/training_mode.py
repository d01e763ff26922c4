"""A model in train mode: does it treat examples one by one, and does it remember them?

Statistics of minibatches that are kept in buffers (batch normalisation, a codebook's running means) would be those of
examples drawn by importance, without their coefficients, and the model is scored and evaluated with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.coupling import check_inputs_independent, check_others_irrelevant
from dask_isgd.norms.model_state import preserved
from dask_isgd.norms.tensor_trees import Loss, batch_size, call, take

_WAYS_OUT = (
    "Use GroupNorm or LayerNorm, or freeze the statistics: let the model's train() call .eval() on these modules "
    "(docs/optimizers.md shows how)"
)


def check_training_mode(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> None:
    """Raise ModelError if a training forward pass couples examples or keeps statistics of them in buffers.

    Found by trial, so it concerns any module. Buffers that change whatever the examples are (counters, the vectors of
    a spectral norm) do not matter. Model and random state are left as they were.
    """
    size = batch_size(inputs, targets)
    half = max(1, size // 2)
    one, other = (dict(_buffers_after(model, take(inputs, rows))) for rows in (slice(0, half), slice(-half, None)))
    if changed := [name for name in one if not _same(one[name], other.get(name))]:
        raise ModelError(
            f"model: in train mode it keeps statistics of its minibatches in buffers: {_listed(model, changed)}. "
            "Importance sampling draws hard examples more often, so these would be of other data than yours, and one "
            f"example's gradient may depend on the others. {_WAYS_OUT}"
        )
    with preserved(model, True):
        try:
            check_inputs_independent(model, loss, inputs, targets)
            check_others_irrelevant(model, loss, inputs, targets, size - 1)
        except ModelError as error:
            raise ModelError(f"model in train mode: {error}. {_WAYS_OUT}") from error


def _buffers_after(model: nn.Module, inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of the buffers as a training forward pass leaves them, from the same state each time."""
    with preserved(model, True):
        try:
            with torch.no_grad():
                call(model, inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(f"model: fails in the learner's train mode: {error}. Change it") from error
        yield from ((name, buffer.clone()) for name, buffer in model.named_buffers())


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _listed(model: nn.Module, buffers: list[str]) -> str:
    """Return modules by kind and name with their buffers, the first few."""
    found: dict[str, list[str]] = {}
    for name in buffers:
        owner, _, key = name.rpartition(".")
        found.setdefault(f"{type(model.get_submodule(owner)).__name__} {owner!r}", []).append(key)
    shown = [f"{owner} ({', '.join(keys)})" for owner, keys in found.items()]
    return "; ".join([*shown[:3], *([f"and {len(shown) - 3} more"] if len(shown) > 3 else [])])

"""The losses of a minibatch: one value per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dask_isgd.errors import ModelError

Loss = Callable[[Any, Any], Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each example, shape (B,): the default loss.

    ``output`` (B, classes) are logits, ``target`` (B,) class indices.
    """
    return nn.functional.cross_entropy(output, target, reduction="none")


def check_losses(losses: object, batch: int) -> Tensor:
    """The losses if there is one per example, else a ModelError with both shapes."""
    if not isinstance(losses, Tensor) or losses.shape != (batch,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ModelError(
            f"loss: got {got}, wanted one loss per example, shape {(batch,)}; "
            "return unreduced losses (reduction='none') and average over all but the first dimension"
        )
    return losses

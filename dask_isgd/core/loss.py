"""The default loss: one value per example."""

from __future__ import annotations

from torch import Tensor, nn

from dask_isgd.norms.tensor_trees import Loss

__all__ = ["Loss", "cross_entropy"]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of each example, shape (B,): the default loss.

    ``output`` (B, classes) are logits, ``target`` (B,) class indices.
    """
    return nn.functional.cross_entropy(output, target, reduction="none")

"""Losses by name: each returns one value per example."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dask_isgd.errors import ConfigError, ModelError
from dask_isgd.names import hint, named
from dask_isgd.norms.tensor_trees import Loss

__all__ = ["LOSSES", "Loss", "bce", "cross_entropy", "huber", "loss_of", "mse"]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of each example, shape (B,): the default loss.

    ``output`` (B, classes) are logits, ``target`` (B,) class indices.
    """
    return nn.functional.cross_entropy(output, target, reduction="none")


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of each example, (B,), the mean over all other dimensions of output and target."""
    return _means(nn.functional.mse_loss, output, target)


def huber(output: Tensor, target: Tensor) -> Tensor:
    """Return the Huber loss of each example, (B,), as ``mse`` does: linear where the error exceeds 1."""
    return _means(nn.functional.huber_loss, output, target)


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross entropy of each example, (B,), as ``mse`` does, from logits and targets in [0, 1]."""
    return _means(nn.functional.binary_cross_entropy_with_logits, output, target)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "bce": bce, "huber": huber}
"""The losses that ``fit`` and recipes know by name."""


def loss_of(loss: Loss | str | None) -> Loss | None:
    """Return the loss that is meant, None for cross entropy of classes.

    ``loss`` is a function, one of ``LOSSES``, or ``"package.module:name"``. Raises ConfigError for anything else.
    """
    if isinstance(loss, str):
        if loss not in LOSSES and ":" not in loss:
            known = ", ".join(LOSSES)
            raise ConfigError(
                f"loss: got {loss!r}, wanted 'package.module:name' or one of {known}; {hint(loss, LOSSES)}"
            )
        loss = LOSSES[loss] if loss in LOSSES else named(loss)
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss: got {type(loss).__name__}, wanted a function of output and target or a name")
    return None if loss is cross_entropy else loss


def _means(function: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
    """Return the means per example of an elementwise loss; (B,) and (B, 1) are the same, nothing else is broadcast."""
    if [n for n in output.shape if n != 1] != [n for n in target.shape if n != 1]:
        raise ModelError(
            f"loss: got an output of shape {tuple(output.shape)} for targets of shape {tuple(target.shape)}, "
            "wanted the same shape; change the model's last layer"
        )
    values = function(output, target.to(output.dtype).reshape(output.shape), reduction="none")
    return values.reshape(len(values), -1).mean(1)

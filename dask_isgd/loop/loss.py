"""The loss of a minibatch whose examples were drawn with unequal probabilities."""

from __future__ import annotations

from torch import Tensor

from dask_isgd.errors import LengthMismatchError


def weighted_mean(losses: Tensor, coefficients: Tensor) -> Tensor:
    """Return (1/B) Σ c L, 0-d: unbiased for the mean loss over the dataset, and so is its gradient.

    ``losses`` (B,) one per example (``reduction="none"``), ``coefficients`` (B,) as the DataLoader delivered them, on
    any device and of any dtype. They are never normalised by their own sum, which would be biased. Under DDP each
    process passes its own share: the mean over processes is then that of the global minibatch.
    Raises LengthMismatchError if there is not one coefficient per loss.
    """
    if losses.ndim != 1 or losses.shape != coefficients.shape:
        raise LengthMismatchError(
            f"weighted_mean: got losses of shape {tuple(losses.shape)} and coefficients of shape "
            f"{tuple(coefficients.shape)}, wanted (B,) both; compute one loss per example, with reduction='none'"
        )
    return (losses * coefficients.to(losses)).mean()

"""Linear layers, Y = X Wᵀ + b.

With one row x_n per example and d_n the gradient of its output: ||∂L_n/∂W||² = ||x_n||² ||d_n||²
and ||∂L_n/∂b||² = ||d_n||² (Goodfellow 2015, arXiv 1510.01799). With T rows per example the gradient is
D_nᵀ X_n, whose squared norm is also Σ (X_n X_nᵀ) ∘ (D_n D_nᵀ): the cheaper of the two is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dask_isgd.norms.examples import square_norms, wide
from dask_isgd.norms.rules import Kept, register_rule

WORKSPACE = 1 << 23
"""Elements a temporary may have: examples are taken in slices that fit (32 MB in float32)."""


@register_rule(nn.Linear)
class LinearRule:
    """Inputs (B, d) or (B, ..., d)."""

    parameters = frozenset({"weight", "bias"})

    def keep(self, module: nn.Module, x: Tensor, squares: frozenset[str], gradients: frozenset[str]) -> Kept:
        if "weight" in gradients or ("weight" in squares and x.ndim > 2):
            return (_rows(x),)
        if "weight" in squares:
            return (square_norms(x),)  # taken while x is hot; x itself can go
        return ()

    def squares(self, module: nn.Module, kept: Kept, grad: Tensor, names: frozenset[str]) -> Tensor:
        if grad.ndim == 2:
            squared = square_norms(grad)
            factor = kept[0] if "weight" in names else None
            if factor is not None and factor.ndim > 1:  # the bias is tied elsewhere, the input was kept whole
                factor = square_norms(factor)
            if factor is None:
                return squared
            return squared * (factor + 1 if "bias" in names else factor)
        rows = _rows(grad)
        total = torch.zeros(len(rows), dtype=wide(rows), device=rows.device)
        if "weight" in names:
            total += product_squares(kept[0], rows)
        if "bias" in names:
            total += square_norms(rows.sum(1))
        return total

    def gradient(self, module: nn.Module, kept: Kept, grad: Tensor, name: str) -> Tensor:
        rows = _rows(grad)
        return rows.sum(1) if name == "bias" else rows.mT @ kept[0].to(rows.dtype)


def product_squares(x_BTd: Tensor, d_BTp: Tensor) -> Tensor:
    """||D_nᵀ X_n||² of each example: (B, T, d), (B, T, p) -> (B,) float64."""
    size, length, inputs = x_BTd.shape
    outputs = d_BTp.shape[2]
    gram = length * (inputs + outputs) < inputs * outputs
    step = max(1, WORKSPACE // max(1, length * length if gram else inputs * outputs))
    squares = torch.zeros(size, dtype=wide(d_BTp), device=d_BTp.device)
    for start in range(0, size, step):
        x, d = x_BTd[start : start + step].to(d_BTp.dtype), d_BTp[start : start + step]
        squares[start : start + step] = gram_squares(x, d) if gram else square_norms(d.mT @ x)
    return squares


def gram_squares(x_BTd: Tensor, d_BTp: Tensor) -> Tensor:
    """:func:`product_squares` through the (T, T) matrices of inner products."""
    products = (x_BTd @ x_BTd.mT).mul_(d_BTp @ d_BTp.mT)
    # Rounding can leave a sum that should be zero a little below it.
    return products.sum((1, 2), dtype=wide(d_BTp)).clamp_min(0)


def _rows(tensor: Tensor) -> Tensor:
    """(B, d) -> (B, 1, d); (B, ..., d) -> (B, T, d)."""
    return tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)

"""Linear layers, Y = X Wᵀ + b.

With one row x_n per example and d_n the gradient of its output: ||∂L_n/∂W||² = ||x_n||² ||d_n||²
and ||∂L_n/∂b||² = ||d_n||² (Goodfellow 2015, arXiv 1510.01799). With T rows per example the gradient is
D_nᵀ X_n, whose squared norm is also Σ (X_n X_nᵀ) ∘ (D_n D_nᵀ); the cheaper form is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dask_isgd.norms.rules import Saved, register_rule
from dask_isgd.norms.tensor_trees import row_norms, wide

WORKSPACE = 1 << 19
"""Elements that a temporary may have (2 MB in float32): slices of examples stay in the cache until squared."""


@register_rule(nn.Linear)
class LinearRule:
    """Inputs (B, d) or (B, ..., d)."""

    parameters = frozenset({"weight", "bias"})

    def save(self, module: nn.Module, x: Tensor, unshared: frozenset[str], shared: frozenset[str]) -> Saved:
        if "weight" in shared or ("weight" in unshared and x.ndim > 2):
            return (_rows(x),)
        if "weight" in unshared:  # the norms are computed while x is in the cache; x itself is not saved
            norms = row_norms(x)
            return (norms.square_().add_(1).sqrt_() if "bias" in unshared else norms,)
        return ()

    def norms(self, module: nn.Module, saved: Saved, grad: Tensor, names: frozenset[str]) -> Tensor:
        if grad.ndim == 2:
            norms = row_norms(grad)
            return norms.mul_(saved[0]) if "weight" in names else norms
        rows = _rows(grad)
        bias = row_norms(rows.sum(1)) if "bias" in names else None
        if "weight" not in names:
            assert bias is not None
            return bias
        weight = product_norms(saved[0], rows)
        return weight if bias is None else torch.hypot(weight, bias)

    def gradient(self, module: nn.Module, saved: Saved, grad: Tensor, name: str) -> Tensor:
        rows = _rows(grad)
        return rows.sum(1) if name == "bias" else rows.mT @ saved[0].to(rows.dtype)


@register_rule("transformers.pytorch_utils.Conv1D")
class TransposedLinearRule(LinearRule):
    """Y = X W + b, the linear layer of Hugging Face's GPT-2."""

    def gradient(self, module: nn.Module, saved: Saved, grad: Tensor, name: str) -> Tensor:
        gradient = super().gradient(module, saved, grad, name)
        return gradient if name == "bias" else gradient.mT


def product_norms(x_BTd: Tensor, d_BTp: Tensor) -> Tensor:
    """Return ||D_nᵀ X_n|| of each example: (B, T, d), (B, T, p) -> (B,)."""
    size, length, inputs = x_BTd.shape
    outputs = d_BTp.shape[2]
    gram = length * (inputs + outputs) < inputs * outputs
    step = max(1, WORKSPACE // max(1, length * length if gram else inputs * outputs))
    norms = []
    for start in range(0, max(size, 1), step):
        x, d = x_BTd[start : start + step].to(d_BTp.dtype), d_BTp[start : start + step]
        norms.append(gram_norms(x, d) if gram else row_norms(d.mT @ x))
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def gram_norms(x_BTd: Tensor, d_BTp: Tensor) -> Tensor:
    """Return :func:`product_norms`, through the (T, T) matrices of inner products."""
    products = (x_BTd @ x_BTd.mT).mul_(d_BTp @ d_BTp.mT)
    # Rounding can make a sum that should be zero slightly negative.
    squares = products.sum((1, 2), dtype=wide(d_BTp)).clamp_min_(0)
    return squares.sqrt_().to(torch.promote_types(d_BTp.dtype, torch.float32))


def _rows(tensor: Tensor) -> Tensor:
    """(B, d) -> (B, 1, d); (B, ..., d) -> (B, T, d)."""
    return tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)

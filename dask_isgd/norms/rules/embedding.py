"""Embeddings: the gradient of a row is the sum of the output's gradients at the positions of its token.

The gradients of a token that occurs twice in an example are summed before squaring.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dask_isgd.norms.rules import Saved, register_rule
from dask_isgd.norms.tensor_trees import square_norms


@register_rule(nn.Embedding)
class EmbeddingRule:
    """Tokens (B, ...); ``padding_idx`` has no gradient."""

    parameters = frozenset({"weight"})

    def save(self, module: nn.Embedding, x: Tensor, unshared: frozenset[str], shared: frozenset[str]) -> Saved:
        return (x,)

    def norms(self, module: nn.Embedding, saved: Saved, grad: Tensor, names: frozenset[str]) -> Tensor:
        size, rows, width = len(grad), module.num_embeddings, module.embedding_dim
        # Each (example, token) once: no table is formed per example. The number of sums is that of all positions, of
        # which the last ones may stay zero: their true number would be known to the device only.
        cells, order = _cells(saved[0], rows).sort()
        first = torch.ones_like(cells, dtype=torch.bool)
        first[1:] = cells[1:] != cells[:-1]
        where = first.cumsum(0) - 1
        sums = grad.new_zeros(len(cells), width, dtype=_sum_dtype(grad))
        sums.index_add_(0, where, grad.reshape(-1, width).to(sums.dtype)[order])
        squares = square_norms(sums)
        owners = torch.zeros_like(cells).scatter_(0, where, cells)
        if module.padding_idx is not None:
            squares = squares.masked_fill_(owners % rows == module.padding_idx, 0)
        total = torch.zeros(size, dtype=squares.dtype, device=grad.device).index_add_(0, owners // rows, squares)
        return total.sqrt_().to(sums.dtype)

    def gradient(self, module: nn.Embedding, saved: Saved, grad: Tensor, name: str) -> Tensor:
        size, rows, width = len(grad), module.num_embeddings, module.embedding_dim
        table = grad.new_zeros(size * rows, width, dtype=_sum_dtype(grad))
        table.index_add_(0, _cells(saved[0], rows), grad.reshape(-1, width).to(table.dtype))
        table = table.view(size, rows, width)
        if module.padding_idx is not None:
            table[:, module.padding_idx] = 0
        return table


def _cells(tokens: Tensor, rows: int) -> Tensor:
    """Return a number for each (example, token), flat, from tokens (B, ...)."""
    examples = torch.arange(len(tokens), device=tokens.device) * rows
    return (tokens + examples.view(-1, *[1] * (tokens.ndim - 1))).flatten()


def _sum_dtype(grad: Tensor) -> torch.dtype:
    return torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype

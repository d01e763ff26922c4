"""The gradients of one parameter for each example, from its uses: the norm of one, and of the sum of several.

The gradient of a use is that of what meets the examples; the nodes between carry it back to the parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dask_isgd.norms.graph_nodes import operation, pulled_back, shape_below
from dask_isgd.norms.meetings import shared_lookup
from dask_isgd.norms.tensor_trees import row_norms, wide
from dask_isgd.norms.uses import Lookup, Product, Use

WORKSPACE = 1 << 24
"""Elements of materialised gradients at a time (64 MB in float32)."""


@dataclass(frozen=True)
class Reading:
    """One use, and the way back to the parameter."""

    use: Use
    nodes: Sequence[Any]
    """From the parameter to the meeting."""
    operands: Sequence[int]
    views: bool = True
    """Whether the nodes before the meeting only move elements, so that the norm is that of the use."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return shape_below(self.nodes[0], self.operands[0])

    @property
    def turned(self) -> bool | None:
        """Whether the parameter is the transpose of the use's matrix; None if it is neither that nor the matrix."""
        between = [operation(node) for node in self.nodes[:-1]]
        return len(between) == 1 if between in ([], ["T"]) else None

    def norms(self, size: int) -> Tensor:
        """Return the norms of the parameter's gradients, (B,)."""
        if self.views:
            return self.use.norms()
        if operation(self.nodes[0]) == "Embedding":
            gradients = pulled_back(self.nodes, self.operands, self.use.of(slice(None)), to=1)
            return shared_lookup(self.nodes[0], gradients).norms()
        shapes = [shape_below(node, operand) for node, operand in zip(self.nodes, self.operands, strict=True)]
        return _in_slices(size, max(prod(shape) for shape in shapes), lambda rows: row_norms(self.of(rows)))

    def of(self, examples: slice) -> Tensor:
        """Return the gradients of the parameter for some examples, (examples, ...)."""
        return pulled_back(self.nodes, self.operands, self.use.of(examples))


def norms_of_sum(readings: list[Reading], size: int) -> Tensor:
    """Return the norms of the sum of several gradients of one parameter, (B,)."""
    readings = _joined(readings)
    if len(readings) == 1:
        return readings[0].norms(size)
    elements = prod(readings[0].shape)
    known = _tied_norms(readings)
    if known is not None:
        norms, sure = known
        for n in (~sure).nonzero().flatten().tolist():  # most of both terms cancels: too few digits would be left
            norms[n : n + 1] = _sum_of(readings, slice(n, n + 1))
        return norms
    return _in_slices(size, elements, lambda rows: _sum_of(readings, rows))


def _sum_of(readings: list[Reading], examples: slice) -> Tensor:
    total = readings[0].of(examples)
    for reading in readings[1:]:
        total = total + reading.of(examples)
    return row_norms(total)


def _in_slices(size: int, elements: int, norms: Any) -> Tensor:
    step = max(1, WORKSPACE // max(1, elements))
    return torch.cat([norms(slice(start, start + step)) for start in range(0, size, step)])


def _joined(readings: list[Reading]) -> list[Reading]:
    """Return the readings with products of one matrix joined: several steps are more positions. Lookups too."""
    groups: defaultdict[Any, list[Reading]] = defaultdict(list)
    for number, reading in enumerate(readings):
        use: Use = reading.use
        key: tuple[Any, ...] = (number,)
        if isinstance(use, Product) and reading.turned is not None:
            key = (Product, reading.turned, use.rows.dtype, use.gradients.dtype)
        elif isinstance(use, Lookup) and len(reading.nodes) == 1:
            key = (Lookup, use.padding, use.gradients.dtype)
        groups[key].append(reading)
    found = []
    for group in groups.values():
        first = group[0]
        if len(group) > 1:
            uses: list[Any] = [reading.use for reading in group]
            gradients = torch.cat([use.gradients.flatten(1, -2) for use in uses], 1)
            if isinstance(first.use, Product):
                use = Product(torch.cat([use.rows for use in uses], 1), gradients)
            else:
                assert isinstance(first.use, Lookup)
                tokens = torch.cat([use.tokens.flatten(1) for use in uses], 1)
                use = Lookup(first.use.rows, first.use.padding, tokens, gradients)
            first = Reading(use, first.nodes, first.operands, first.views)
        found.append(first)
    return found


def _tied_norms(readings: list[Reading]) -> tuple[Tensor, Tensor] | None:
    """Return the norms (B,) of a table that is also a matrix of products x Wᵀ, and where they have enough digits.

    The inner product of both gradients needs neither: Σ_ts (x_s · g_t) d_s[token of t], s being positions of the
    product and t those of the lookup.
    """
    kinds = {type(reading.use): reading for reading in readings}
    if len(readings) != 2 or kinds.keys() != {Lookup, Product} or not kinds[Product].turned:
        return None
    lookup, product = kinds[Lookup].use, kinds[Product].use
    assert isinstance(lookup, Lookup)
    assert isinstance(product, Product)
    tokens, g_BTd = lookup.tokens.flatten(1), lookup.gradients.flatten(1, -2)
    x_BSd, d_BSV = product.rows.to(g_BTd.dtype), product.gradients
    d_BST = d_BSV.gather(2, tokens[:, None].expand(-1, d_BSV.shape[1], -1))
    if lookup.padding is not None:
        d_BST = d_BST.masked_fill(tokens[:, None] == lookup.padding, 0)
    dtype = wide(g_BTd)
    cross = ((x_BSd @ g_BTd.mT).mul_(d_BST)).sum((1, 2), dtype=dtype)
    apart = lookup.norms().to(dtype).square_() + product.norms().to(dtype).square_()
    squares = apart + 2 * cross
    return squares.clamp_min(0).sqrt_().to(torch.promote_types(g_BTd.dtype, torch.float32)), squares >= 1e-2 * apart

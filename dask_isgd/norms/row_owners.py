"""Whose each row is, where an index chose the rows: read from the graph of each batch, never remembered.

Rows that are routed to experts, unpadded, or sorted belong to other examples in every batch. Behind the index, the
graph holds operations that keep each row in its place, back to where the index itself is recorded; before it, every row
is at its example's place, which the audit ascertains (``row_choices``). Whose the rows are follows from both.

Owners are numbers of examples in a shape that broadcasts to that of the rows: (R, 1) for a matrix of R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dask_isgd.norms.graph_nodes import operation, shape_below, signed

_ELEMENTWISE = """
    Abs Add Clamp ClampMax ClampMin Clone Div Elu Exp Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log Mish Mul
    NativeDropout Neg Pow Relu Rsqrt Rsub Sigmoid Silu Softplus Sqrt Sub Tanh ToCopy MaskedFill Expand"""
_RESHAPED = frozenset(["Alias", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"])
_CUT = frozenset(["Select", "Slice", "Split", "SplitWithSizes"])
_ROWS = dict.fromkeys(_ELEMENTWISE.split(), (0, 1)) | dict.fromkeys((*_RESHAPED, *_CUT, "Index"), (0,))
_ROWS |= {"Mm": (0,), "GroupedMm": (0,), "Addmm": (1,), "NativeLayerNorm": (0,)}
"""The operations that keep rows in their place, or record the index that moves them, and the operands that rows are."""


@dataclass(frozen=True)
class RowOwners:
    """The owners of the rows of one tensor."""

    size: int
    """The number of examples."""
    owners: Tensor
    indices: tuple[Tensor, ...]
    """The indices that chose the rows."""

    @cached_property
    def _covered(self) -> int:
        """The number of dimensions, from the first on, whose elements may have different owners."""
        return max([k + 1 for k, n in enumerate(self.owners.shape) if n != 1], default=1)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, int]:
        """The place of each row among T places per example, the places that stay empty, and T."""
        owners = self.owners.flatten()
        order = owners.argsort(stable=True)
        counts = torch.bincount(owners, minlength=self.size)
        most = int(counts.max()) if len(owners) else 0
        starts = counts.cumsum(0) - counts
        ordered = owners[order]
        places = torch.empty_like(order)
        places[order] = ordered * most + torch.arange(len(order), device=order.device) - starts[ordered]
        empty = torch.ones(self.size * most, dtype=torch.bool, device=order.device)
        empty[places] = False
        return places, empty.nonzero().flatten(), most

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of each example, (B, T, ...), followed by zeros where others have more."""
        places, empty, most = self._places
        rows = tensor.flatten(0, self._covered - 1)
        if len(rows) != len(places):
            raise ValueError(f"got {len(rows)} rows, wanted {len(places)}")
        found = rows.new_empty(self.size * most, *rows.shape[1:])
        found.index_copy_(0, places, rows).index_fill_(0, empty, 0)
        return found.view(self.size, most, *rows.shape[1:])

    def within(self, groups: Tensor, count: int) -> RowOwners:
        """Return owners of the first rows, of which each is an example in one of ``count`` groups.

        ``groups`` are the numbers of the groups, one per row; the owner's number is group · B + example.
        """
        owners = self.owners.flatten()[: len(groups)]
        return RowOwners(count * self.size, groups * self.size + owners, self.indices)


class OwnersOfRows:
    """Finds the owners of rows in the graph of one pass over ``size`` examples."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: dict[Any, RowOwners | None] = {}

    def at(self, node: Any, shared: int) -> RowOwners | None:
        """Return the owners of the rows that a node combines with its operand ``shared``; None if they are unknown."""
        operand = _rows_operand(node, but=shared)
        return None if operand is None else self._of(*node.next_functions[operand])

    def _of(self, node: Any, output: int) -> RowOwners | None:
        """Return the owners of a node's result."""
        chain: list[tuple[Any, int, int | None]] = []
        while node not in self._known:
            operand = _rows_operand(node)
            chain.append((node, output, operand))
            if operand is None:
                break
            node, output = node.next_functions[operand]
        for node, output, operand in reversed(chain):
            if operand is None:
                self._known[node] = self._in_place(node, output)
            else:
                before = self._known[node.next_functions[operand][0]]
                self._known[node] = None if before is None else _carried(node, output, operand, before)
        return self._known[chain[0][0] if chain else node]

    def _in_place(self, node: Any, output: int) -> RowOwners | None:
        """Return the owners of rows that are at their examples' places."""
        result = node._input_metadata[output]
        shape, size = tuple(result.shape), self.size
        if not shape or not shape[0] or shape[0] % size:
            return None
        owners = torch.arange(size, device=result.device).repeat_interleave(shape[0] // size)
        return RowOwners(size, owners.reshape(-1, *[1] * (len(shape) - 1)), ())


def _rows_operand(node: Any, *, but: int | None = None) -> int | None:
    """Return the operand of a node that its rows are, if there is one in the graph."""
    for operand in _ROWS.get(operation(node), ()):
        if operand == but or operand >= len(node.next_functions):
            continue
        following, _ = node.next_functions[operand]
        if following is None or hasattr(following, "variable"):
            continue
        shape, result = shape_below(node, operand), node._input_metadata[0].shape
        if operation(node) not in _ROWS_BY_SHAPE or (len(shape) == len(result) and shape[0] == result[0]):
            return operand
    return None


_ROWS_BY_SHAPE = frozenset(_ELEMENTWISE.split())
"""Operations of which either operand may be the rows: the one that is not broadcast."""


def _carried(node: Any, output: int, operand: int, before: RowOwners) -> RowOwners | None:
    """Return the owners of a node's result, given those of its operand."""
    name, owners = operation(node), before.owners
    given, result = tuple(shape_below(node, operand)), tuple(node._input_metadata[output].shape)
    if name == "Index":
        indices = tuple(index for index in node._saved_indices if index is not None)
        moved = _indexed(owners, given, node._saved_indices)
        return RowOwners(before.size, moved, (*before.indices, *indices))
    if name in _RESHAPED:
        reshaped = _reshaped(owners, given, result)
        return None if reshaped is None else RowOwners(before.size, reshaped, before.indices)
    if name in _CUT:
        dim = signed(node._saved_dim)
        if owners.shape[dim] != 1:
            return None
        return RowOwners(before.size, owners.select(dim, 0), before.indices) if name == "Select" else before
    if name in ("Mm", "Addmm", "GroupedMm", "NativeLayerNorm"):
        return before if owners.shape[-1] == 1 else None
    return before


def _indexed(owners: Tensor, shape: tuple[int, ...], indices: tuple[Tensor | None, ...]) -> Tensor:
    """Return the owners of ``x[indices]``, where ``x`` has ``shape``."""
    full, dim = list(owners.shape), 0
    for index in indices:
        covered = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            full[dim : dim + covered] = shape[dim : dim + covered]
        dim += covered
    return owners.expand(full)[tuple(slice(None) if index is None else index for index in indices)]


def _reshaped(owners: Tensor, given: tuple[int, ...], result: tuple[int, ...]) -> Tensor | None:
    """Return the owners of a tensor of shape ``given`` that is reshaped to ``result``."""
    least = max([k + 1 for k, n in enumerate(owners.shape) if n != 1], default=0)
    for covered in range(least, len(given) + 1):
        elements = torch.Size(given[:covered]).numel()
        for leading in range(len(result) + 1):
            if torch.Size(result[:leading]).numel() == elements:
                moved = owners.expand(*given[:covered], *owners.shape[covered:]).reshape(result[:leading])
                return moved.reshape(*result[:leading], *[1] * (len(result) - leading))
    return None

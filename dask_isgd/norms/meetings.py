"""Where a parameter, or what is computed of parameters alone, meets the examples in the graph.

The gradient of the meeting node's result has the examples, and yields the gradient of each example. One function per
operation and operand turns it into a *use*: the gradients (B, ...) themselves, or the factors that they are a product
of, whose norm is cheaper than they are.

Shapes: B examples, T positions, d inputs, p outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dask_isgd.norms.graph_nodes import shape_below, summed_to
from dask_isgd.norms.row_owners import RowOwners
from dask_isgd.norms.uses import Gradients, Kernel, Lookup, Product, Stack, Use


@dataclass(frozen=True)
class Examples:
    """Where the examples are in a tensor."""

    size: int
    positions_first: bool = False
    owners: RowOwners | None = None
    """Whose each row is, where an index chose the rows."""

    def first(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the examples first: (B, ...)."""
        if self.owners is not None:
            return self.owners.gathered(tensor)
        if not self.positions_first:
            return tensor if tensor.shape[0] == self.size else tensor.reshape(self.size, -1, *tensor.shape[1:])
        if tensor.ndim < 2 or tensor.shape[1] != self.size:
            raise ValueError(f"got the shape {tuple(tensor.shape)}, wanted {self.size} examples second")
        return tensor.transpose(0, 1)

    def rows(self, matrix: Tensor) -> Tensor:
        """Return a matrix of one row per example and position: (B T, d) or (T B, d) -> (B, T, d)."""
        if self.owners is not None:
            return self.owners.gathered(matrix)
        if self.positions_first:
            return matrix.reshape(-1, self.size, matrix.shape[1]).transpose(0, 1)
        return matrix.reshape(self.size, -1, matrix.shape[1])


Meeting = Callable[[Any, int, Tensor, Examples], Use]
"""A node, the operand that is shared, the gradient of the node's result, and where the examples are in it."""

MEETINGS: dict[tuple[str, int], Meeting] = {}


def meeting(name: str, *operands: int) -> Callable[[Meeting], Meeting]:
    """Return a decorator that registers the function of an operation and its operands."""

    def register(function: Meeting) -> Meeting:
        for operand in operands:
            MEETINGS[name, operand] = function
        return function

    return register


@meeting("Add", 0, 1)
@meeting("Sub", 0, 1)
@meeting("Expand", 0)
@meeting("Addmm", 0)
def _added(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    name = str(node.name())
    if operand == 1 and node._saved_alpha != 1:
        gradient = gradient * node._saved_alpha
    if operand == 1 and name.startswith("Sub"):
        gradient = -gradient
    if name.startswith("Addmm") and node._saved_beta != 1:
        gradient = gradient * node._saved_beta
    rows = examples.rows(gradient) if name.startswith("Addmm") else examples.first(gradient)
    return Gradients(summed_to(rows, shape_below(node, operand)))


@meeting("Mul", 0, 1)
def _multiplied(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    other = node._saved_other if operand == 0 else node._saved_self
    return Gradients(summed_to(examples.first(gradient * other), shape_below(node, operand)))


@meeting("Div", 0, 1)
def _divided(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    gradient = gradient / node._saved_other
    if operand == 1:
        gradient = -gradient * node._saved_self / node._saved_other
    return Gradients(summed_to(examples.first(gradient), shape_below(node, operand)))


@meeting("Repeat", 0)
def _repeated(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    shape = shape_below(node, operand)
    repeats = list(node._saved_repeats)
    own = [1] * (len(repeats) - len(shape)) + list(shape)
    pairs = [n for pair in zip(repeats, own, strict=True) for n in pair]
    parts = examples.first(gradient.reshape(pairs[0] * pairs[1], *pairs[2:]))  # (B, more, ...)
    parts = parts.reshape(len(parts), -1, *pairs[1:])
    return Gradients(parts.sum([1, *range(3, parts.ndim, 2)]).reshape(len(parts), *shape))


@meeting("Mm", 1)
@meeting("Addmm", 2)
def _product(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    addition = operand == 2
    rows = node._saved_mat1 if addition else node._saved_self
    if addition and node._saved_alpha != 1:
        gradient = gradient * node._saved_alpha
    return Product(examples.rows(rows), examples.rows(gradient))


@meeting("GroupedMm", 1)
def _grouped_product(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    """Rows in an order in which those of one matrix follow each other; past the last offset, nothing is multiplied."""
    rows, offsets = node._saved_self, node._saved_offs
    if examples.owners is None or rows.ndim != 2 or len(shape_below(node, operand)) != 3:
        raise ValueError("not rows of known examples that are multiplied by a stack of matrices")
    end = int(offsets[-1])
    groups = torch.searchsorted(offsets, torch.arange(end, dtype=offsets.dtype, device=rows.device), right=True)
    owners = examples.owners.within(groups, len(offsets))
    return Stack(Product(owners.gathered(rows[:end]), owners.gathered(gradient[:end])), len(offsets))


@meeting("Embedding", 0)
def _lookup(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    return _lookup_of(node, examples.first(node._saved_indices), examples.first(gradient))


def shared_lookup(node: Any, gradients: Tensor) -> Use:
    """Return the use of a table in which the same tokens are looked up for all examples."""
    tokens = node._saved_indices
    return _lookup_of(node, tokens.expand(len(gradients), *tokens.shape), gradients)


def _lookup_of(node: Any, tokens: Tensor, gradients: Tensor) -> Use:
    rows, padding = shape_below(node, 0)[0], node._saved_padding_idx
    return Lookup(rows, padding if 0 <= padding < rows else None, tokens, gradients)


@meeting("Convolution", 1, 2)
def _convolution(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    if len(gradient) != examples.size:
        raise ValueError(f"a convolution of {len(gradient)} images for {examples.size} examples")
    if operand == 2:
        return Gradients(gradient.flatten(2).sum(2))
    weight = node._saved_weight
    inputs, outputs = (0, 1) if node._saved_transposed else (1, 0)
    layer = SimpleNamespace(
        weight=weight,
        transposed=node._saved_transposed,
        in_channels=weight.shape[inputs] * (1 if node._saved_transposed else node._saved_groups),
        out_channels=weight.shape[outputs] * (node._saved_groups if node._saved_transposed else 1),
        kernel_size=tuple(weight.shape[2:]),
        stride=tuple(node._saved_stride),
        padding=tuple(node._saved_padding),
        padding_mode="zeros",
        dilation=tuple(node._saved_dilation),
        groups=node._saved_groups,
    )
    return Kernel(layer, node._saved_input, gradient)


@meeting("NativeLayerNorm", 1, 2)
def _layer_norm(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    if operand == 1:
        gradient = (node._saved_input - node._saved_result1).mul_(node._saved_result2).mul_(gradient)
    return Gradients(summed_to(examples.first(gradient), shape_below(node, operand)))


@meeting("NativeGroupNorm", 1, 2)
def _group_norm(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    if operand == 1:
        x, groups = node._saved_input, node._saved_group
        parts = x.reshape(len(x), groups, -1)
        normalised = (parts - node._saved_result1[..., None]).mul_(node._saved_result2[..., None])
        gradient = normalised.view(gradient.shape) * gradient
    return _over_images(gradient, examples)


@meeting("NativeBatchNorm", 1, 2)
def _batch_norm(node: Any, operand: int, gradient: Tensor, examples: Examples) -> Use:
    """Normalised by running statistics: the sums over positions come before them."""
    if node._saved_training:
        raise ValueError("batch normalisation by the batch's own statistics")
    if operand == 2:
        return _over_images(gradient, examples)
    mean = node._saved_running_mean
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    sums = _over_images(gradient * node._saved_input, examples).of(slice(None))
    return Gradients((sums - _over_images(gradient, examples).of(slice(None)) * mean) * scale)


def _over_images(gradient: Tensor, examples: Examples) -> Gradients:
    """(B, C, ...) -> (B, C); images may be folded into the examples."""
    sums = gradient.flatten(2).sum(2) if gradient.ndim > 2 else gradient
    each = examples.first(sums)
    return Gradients(each if each.ndim == 2 else each.sum(1))

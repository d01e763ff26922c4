"""The nodes of autograd's graph: what they are, what feeds them, and their gradients for a batch of examples."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Feeds = dict[Any, list[tuple[Any, int]]]
"""For every node, the nodes that use its result and the operand that it is."""


def operation(node: Any) -> str:
    """Return the name of a node's operation: ``Mul`` for ``MulBackward0``."""
    return re.sub(r"Backward\d*$", "", str(node.name()).rpartition("::")[2])


def signed(number: int) -> int:
    """Return a dimension or an index that a node has saved without its sign."""
    return number if number < 1 << 63 else number - (1 << 64)


def accumulator(parameter: Tensor) -> Any:
    """Return the node that accumulates a parameter's gradient."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def feeds_of(roots: Iterable[Tensor]) -> Feeds:
    """Return what every node of a graph feeds."""
    feeds: defaultdict[Any, list[tuple[Any, int]]] = defaultdict(list)
    seen = set()
    ahead = [root.grad_fn for root in roots if root.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        for operand, (following, _) in enumerate(node.next_functions):
            if following is not None:
                feeds[following].append((node, operand))
                ahead.append(following)
    return feeds


def fed_by(leaf: Any, feeds: Feeds) -> set[Any]:
    """Return every node whose result depends on a leaf's."""
    found: set[Any] = set()
    ahead = [leaf]
    while ahead:
        for node, _ in feeds.get(ahead.pop(), ()):
            if node not in found:
                found.add(node)
                ahead.append(node)
    return found


def shape_below(node: Any, operand: int) -> torch.Size:
    """Return the shape of what a node takes as an operand."""
    following, output = node.next_functions[operand]
    return torch.Size(following._input_metadata[output].shape)


def without_examples(feeds: Feeds, size: int) -> set[Any]:
    """Return the nodes of a graph whose results the examples share: computed of parameters alone.

    ``size`` is the number of examples, and divides no dimension of a parameter. What does not depend on the
    parameters is not in the graph: its examples show in the shape of the result.
    """
    shared: dict[Any, bool] = {}
    for start in list(feeds):
        ahead = [start]
        while ahead:
            node = ahead[-1]
            if node in shared:
                ahead.pop()
                continue
            below = [following for following, _ in node.next_functions if following is not None]
            waiting = [following for following in below if following not in shared]
            if waiting:
                ahead += waiting
                continue
            dimensions = (n for result in node._input_metadata for n in result.shape)
            shared[node] = all(n == 0 or n % size for n in dimensions) and all(shared[node] for node in below)
            ahead.pop()
    return {node for node, alone in shared.items() if alone}


def pulled_back(nodes: Sequence[Any], operands: Sequence[int], gradients: Tensor, *, to: int = 0) -> Tensor:
    """Return the gradients (B, ...) of the operand of ``nodes[to]``, given those of the last node's operand.

    Each node takes the result of the one before as the operand ``operands[k]``; the last one is not passed.
    """
    for k in range(len(nodes) - 2, to - 1, -1):
        output = nodes[k + 1].next_functions[operands[k + 1]][1]
        gradients = _through(nodes[k], operands[k], output, gradients)
    return gradients


_RESHAPES = frozenset(["Alias", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"])


def _through(node: Any, operand: int, output: int, gradients: Tensor) -> Tensor:
    """Return the gradients (B, ...) of a node's operand, given those of one of its results."""
    if operation(node) in _RESHAPES:
        return gradients.reshape(len(gradients), *shape_below(node, operand))
    before: list[None] = [None] * output
    after: list[None] = [None] * (len(node._input_metadata) - output - 1)

    def one(gradient: Tensor) -> Tensor:
        found = node(*before, gradient.reshape(node._input_metadata[output].shape), *after)
        result: Tensor = found if isinstance(found, Tensor) else found[operand]
        return result

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of operations that it has only slow batching rules for
            before_node = torch.vmap(one)(gradients)
    except (RuntimeError, ValueError, NotImplementedError):  # vmap does not know every operation
        before_node = torch.stack([one(gradient) for gradient in gradients])
    return summed_to(before_node, shape_below(node, operand))  # what was broadcast, the engine would sum


def summed_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum a gradient (B, ...) over everything but the examples that an operand of this shape was broadcast over."""
    inner = gradient.ndim - 1
    own = shape[-inner:] if inner and len(shape) else torch.Size()
    missing = inner - len(own)
    dims = [1 + k for k in range(missing)] + [1 + missing + k for k, n in enumerate(own) if n == 1]
    dims = [dim for dim in dims if gradient.shape[dim] != 1]  # torch would copy
    summed = gradient.sum(dims, keepdim=True) if dims else gradient
    return summed.reshape(len(gradient), *shape)

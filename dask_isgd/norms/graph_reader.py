"""Norms of parameters that no layer's rule serves, read off the graph of a pass.

Positions, class tokens, scales, the projections of attention, a library's own layers, weights that are computed of
other parameters: each enters the graph at nodes that combine it with the examples. The gradient that arrives there has
the examples, and yields the gradient of each. Nothing in the pass is changed: it is the same to the bit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dask_isgd.norms.graph_nodes import Feeds, accumulator, fed_by, feeds_of, operation, signed
from dask_isgd.norms.meetings import MEETINGS, Examples
from dask_isgd.norms.readings import Reading, norms_of_sum
from dask_isgd.norms.row_owners import OwnersOfRows, RowOwners
from dask_isgd.norms.tensor_trees import wide
from dask_isgd.norms.uses import Gradients

Path = tuple[tuple[str, int], ...]
"""Operations, and the operand that each takes, from a parameter to the node where it meets the examples."""

_VIEWS = """
    Alias Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T ToCopy Transpose Unbind UnsafeSplit
    UnsafeView Unsqueeze View"""
VIEWS = frozenset(_VIEWS.split())
"""Operations that only move a parameter's elements or omit some: the norm of a gradient is the same before them."""


@dataclass(frozen=True)
class SharedTerm:
    """One parameter, and where it meets the examples."""

    name: str
    paths: frozenset[Path]
    positions_first: bool = False
    """Whether the gradient at the node has the positions first, not the examples."""
    routed: bool = False
    """Whether an index chose the rows, so that whose they are must be read in each pass."""


class GraphReader:
    """Reads the terms of one pass: after the forward pass it finds the nodes, in the backward pass it has gradients."""

    def __init__(self, model: nn.Module, terms: tuple[SharedTerm, ...], size: int, *, deferred: bool = False) -> None:
        self.model = model
        self.terms = terms
        self.size = size
        self.deferred = deferred
        """Whether the backward pass omits the nodes of what the examples share: they can be passed after it only."""
        self.failed: dict[str, str] = {}
        """Terms that do not meet the examples where the audit found them to, or whose gradient fails; and why."""
        self._readings: defaultdict[str, list[Reading]] = defaultdict(list)
        self._norms: dict[str, Tensor] = {}
        self._expected: Counter[str] = Counter()
        self._arrived: Counter[str] = Counter()
        self._nodes: dict[Any, list[Any]] = {}
        self._feeds: Feeds = {}
        self._apart: dict[str, bool] = {}
        self._owners = OwnersOfRows(size)
        self._handles: list[Any] = []

    def find(self, roots: Iterable[Tensor]) -> None:
        """Find the nodes where the terms meet the examples, in the graph of a forward pass."""
        self._feeds = feeds_of(roots) if self.terms else {}
        for term in self.terms:
            try:
                self._find(term)
            except Exception as error:  # the training step continues whatever fails here
                self.failed[term.name] = f"{type(error).__name__}: {error}"

    def _find(self, term: SharedTerm) -> None:
        leaf = accumulator(self.model.get_parameter(term.name))
        found = known_meetings(leaf, self._feeds, term.paths)
        self._apart[term.name] = _parts_apart(found)
        for path, nodes in found:
            if path not in term.paths:
                self.failed[term.name] = "it meets the examples at other operations than in the audit"
                continue
            self._expected[term.name] += 1
            hook = self._hook_of(term, path, nodes)
            self._nodes.setdefault(nodes[-1], []).append(hook)
            self._handles.append(nodes[-1].register_prehook(hook))

    def close(self) -> None:
        """Let go of the graph, whose nodes hold this reader: Python's collector does not see that circle."""
        while self._handles:
            self._handles.pop().remove()
        self._nodes.clear()
        self._feeds = {}
        self._owners = OwnersOfRows(self.size)

    def edges(self, leaves: Iterable[Tensor]) -> list[GradientEdge]:
        """Return the meetings that a backward pass to these leaves would not pass."""
        if not self._nodes:
            return []
        reached = set[Any]().union(*(fed_by(accumulator(leaf), self._feeds) for leaf in leaves))
        return [GradientEdge(node, 0) for node in self._nodes if node not in reached]

    def deliver(self, edges: Iterable[GradientEdge], gradients: Iterable[Tensor | None]) -> None:
        """Read the gradients of meetings that were not passed."""
        for edge, gradient in zip(edges, gradients, strict=True):
            for hook in self._nodes[edge.node]:
                hook((gradient,))

    @property
    def complete(self) -> bool:
        """Whether every term met the examples where it was found to, and every gradient arrived."""
        return not self.failed and self._arrived == self._expected

    def squares(self) -> list[Tensor] | None:
        """Return the square norms of every term, (B,) each; None if a gradient is missing."""
        return list(self.by_term().values()) if self.complete else None

    def by_term(self) -> dict[str, Tensor]:
        """Return the square norms of the terms whose gradients have arrived, (B,) each."""
        with torch.no_grad():
            for name, readings in self._readings.items():
                try:
                    norms, before = norms_of_sum(readings, self.size), self._norms.get(name)
                    self._norms[name] = norms if before is None else torch.hypot(before, norms)  # of parts apart
                except Exception as error:  # the training step continues whatever fails here
                    self.failed[name] = f"{type(error).__name__}: {error}"
        self._readings.clear()
        return {name: norm.to(wide(norm)).square() for name, norm in self._norms.items()}

    def _hook_of(self, term: SharedTerm, path: Path, nodes: list[Any]) -> Any:
        arrived = False

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            nonlocal arrived
            gradient = gradients[0]
            if arrived or gradient is None:
                return
            arrived = True
            self._arrived[term.name] += 1
            try:
                with torch.no_grad():
                    self._add(term, path, nodes, gradient)
            except Exception as error:  # the training step continues whatever fails here
                self.failed[term.name] = f"{type(error).__name__}: {error}"

        return hook

    def _add(self, term: SharedTerm, path: Path, nodes: list[Any], gradient: Tensor) -> None:
        operands = [operand for _, operand in path]
        owners: RowOwners | None = None
        if term.routed and (owners := self._owners.at(nodes[-1], operands[-1])) is None:
            raise ValueError("the graph does not record whose each row is")
        examples = Examples(self.size, term.positions_first, owners)
        use = MEETINGS[path[-1]](nodes[-1], operands[-1], gradient, examples)
        views = all(name in VIEWS for name, _ in path[:-1])
        reading = Reading(use, nodes, operands, views)
        if self._apart[term.name] and (views or not self.deferred):
            norms = reading.norms(self.size)
            before = self._norms.get(term.name)
            self._norms[term.name] = norms if before is None else torch.hypot(before, norms)
        elif views or self.deferred:
            self._readings[term.name].append(reading)
        else:  # its nodes are gone when the other uses have arrived
            self._readings[term.name].append(Reading(Gradients(reading.of(slice(None))), nodes[:1], operands[:1]))


def _parts_apart(uses: list[tuple[Path, list[Any]]]) -> bool:
    """Return whether no element of a parameter has several uses: there is one use, or each is of another part."""
    if len(uses) == 1:
        return True
    parts = [_part(path, nodes) for path, nodes in uses]
    known = {part for part in parts if part is not None}
    return len(known) == len(uses) and len({way for way, _ in known}) == 1


def _part(path: Path, nodes: list[Any]) -> tuple[Any, int] | None:
    """Return how a parameter is cut into parts, and the number of the part that a use is of; None if it is not cut."""
    first, name = nodes[0], path[0][0]
    if name == "Select":
        dim, sizes = signed(first._saved_dim), first._saved_self_sym_sizes
        return dim % len(sizes), signed(first._saved_index) % sizes[dim]
    if name in ("Split", "SplitWithSizes", "Unbind") and len(nodes) > 1:
        return first, nodes[1].next_functions[path[1][1]][1]
    return None


def known_meetings(leaf: Any, feeds: Feeds, known: Set[Path]) -> list[tuple[Path, list[Any]]]:
    """Return the paths from a leaf along ``known`` ones, and their nodes; also those that leave them, up to there.

    Where a known path ends and others go on, the nodes behind decide: a projection of tokens and of what all examples
    share, for example, begins with the same operations.
    """
    inner = {path[:k] for path in known for k in range(1, len(path))}

    def beyond(path: Path, nodes: list[Any]) -> list[tuple[Path, list[Any]]]:
        found = []
        for node, operand in feeds.get(nodes[-1] if nodes else leaf, ()):
            longer, with_node = (*path, (operation(node), operand)), [*nodes, node]
            behind = beyond(longer, with_node) if longer in inner else []
            ends = not behind or (longer in known and any(further not in known for further, _ in behind))
            found += [(longer, with_node)] if ends else behind
        return found

    return beyond((), [])

"""Norms of parameters that the examples share past any layer with a rule, read off the graph of a training step.

Positions, class tokens, scales and the projections of attention enter the graph at a node that combines them with the
examples: a sum, a product, an expansion or a matrix product. The gradient that arrives at this node has the batch
first, and yields the gradient of each example. Nothing in the step is changed: it is the same to the bit.

Shapes: B examples, T positions, d inputs, p outputs; a matrix product has one row per example and position.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.parameter_uses import BROADCASTING, operation
from dask_isgd.norms.rules import RULES, Saved, rule_of
from dask_isgd.norms.rules.linear import product_norms
from dask_isgd.norms.tensor_trees import row_norms, wide

WORKSPACE = 1 << 24
"""Elements of materialised gradients at a time (64 MB in float32)."""

Path = tuple[tuple[str, int], ...]
"""Operations, and the operand that each takes, from what is shared to the node that combines it with the examples."""

_VIEWS = frozenset(["Alias", "Permute", "Select", "Slice", "Squeeze", "T", "ToCopy", "Transpose", "Unsqueeze", "View"])
PRODUCTS = {("Addmm", 2), ("Mm", 1), ("Embedding", 0)}
_COMBINES = {("Expand", 0), ("Addmm", 0), *((name, k) for name in ("Add", "Sub", "Mul") for k in (0, 1)), *PRODUCTS}


@dataclass(frozen=True)
class SharedTerm:
    """One parameter, or the output of one layer that all examples share, and where it meets them."""

    name: str
    """The parameter, or the layer."""
    paths: tuple[Path, ...]
    layer: CapturedLayer | None = None
    """The layer, if its output is what is shared."""
    parameters: tuple[str, ...] = ()
    """The layer's parameters, by their names in the model."""
    positions_first: bool = False
    """Whether the gradient at the node has the positions first, not the examples."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the term covers."""
        return self.parameters or (self.name,)


class SharedReader:
    """Reads the terms of one step: after the forward pass it finds the nodes, in the backward pass it has gradients."""

    def __init__(self, model: nn.Module, terms: tuple[SharedTerm, ...], size: int) -> None:
        self.model = model
        self.terms = terms
        self.size = size
        self.recording = True
        self.failed: dict[str, str] = {}
        """Terms that do not meet the examples where the audit found them to, or whose gradient fails; and why."""
        self._outputs: dict[str, list[tuple[Any, Saved]]] = defaultdict(list)
        self._sums: dict[str, Tensor] = {}
        self._uses: defaultdict[str, list[_Use]] = defaultdict(list)
        self._expected: Counter[str] = Counter()
        self._arrived: Counter[str] = Counter()
        self._handles: list[Any] = []
        for term in terms:
            if term.layer is not None:
                hook = model.get_submodule(term.name).register_forward_hook(self._hook_of(term.layer), prepend=True)
                self._handles.append(hook)

    def close(self) -> None:
        """Remove the hooks of layers."""
        while self._handles:
            self._handles.pop().remove()

    def find(self, roots: Iterable[Tensor]) -> None:
        """Find the nodes where the terms meet the examples, in the graph of a forward pass."""
        feeds = feeds_of(roots)
        for term in self.terms:
            found = Counter[Path]()
            leaf = self.leaf(term)
            for path, nodes in meetings(leaf, feeds, set(term.paths)) if leaf is not None else ():
                found[path] += 1
                if path not in term.paths:
                    continue
                self._expected[term.name] += 1
                nodes[-1].register_prehook(self._prehook_of(term, path, nodes))
            if found != Counter(term.paths):
                self.failed[term.name] = "it meets the examples at other operations than in the audit"

    def squares(self) -> list[Tensor] | None:
        """Return the square norms of every term, (B,) each; None if a gradient is missing."""
        return list(self.by_term().values()) if self.complete else None

    @property
    def complete(self) -> bool:
        """Whether every term met the examples where it was found to, and every gradient arrived."""
        return not self.failed and self._arrived == self._expected

    def by_term(self) -> dict[str, Tensor]:
        """Return the square norms of the terms whose gradients have arrived, (B,) each."""
        with torch.no_grad():
            norms = {name: _norms_of(uses, self.model.get_parameter(name).numel()) for name, uses in self._uses.items()}
        for term in self.terms:
            total = self._sums.get(term.name)
            if total is None:
                continue
            if term.layer is None:
                norms[term.name] = row_norms(total)
                continue
            module = self.model.get_submodule(term.name)
            rule = rule_of(module)
            assert rule is not None
            ((_, saved),) = self._outputs[term.name]
            norms[term.name] = rule.norms(module, saved, total, term.layer.unshared)
        return {name: norm.to(wide(norm)).square() for name, norm in norms.items()}

    def leaf(self, term: SharedTerm) -> Any:
        """Return the node of what a term shares, in the graph of the forward pass; None if there is not one."""
        if term.layer is None:
            return accumulator(self.model.get_parameter(term.name))
        outputs = self._outputs[term.name]
        return outputs[0][0] if len(outputs) == 1 else None

    def _hook_of(self, layer: CapturedLayer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.recording and isinstance(output, Tensor) and output.requires_grad:
                rule = rule_of(module)
                assert rule is not None
                x = layer.layout.batch_first(args[0].detach(), self.size)
                self._outputs[layer.name].append((output.grad_fn, rule.save(module, x, layer.unshared, frozenset())))

        return hook

    def _prehook_of(self, term: SharedTerm, path: Path, nodes: list[Any]) -> Any:
        kind, operand = path[-1]
        node, views = nodes[-1], nodes[:-1]
        shape = _shape_below(node, operand)

        def add(gradient: Tensor) -> None:
            if (kind, operand) in PRODUCTS:
                use = self._use(term, node, kind, gradient, turned=bool(views))
                self._uses[term.name].append(use)
                return
            if kind == "Mul":
                gradient = gradient * (node._saved_other if operand == 0 else node._saved_self)
            if kind == "Addmm":
                gradient = self._by_example(term, gradient)
            elif term.positions_first:
                gradient = gradient.transpose(0, 1)
            each = _summed_to(gradient, shape)
            if views:
                each = torch.stack([_through(views, path, row.reshape(shape)) for row in each])
            known = self._sums.get(term.name)
            self._sums[term.name] = each if known is None else known + each

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[0]
            if not self.recording or gradient is None:
                return
            self._arrived[term.name] += 1
            try:
                with torch.no_grad():
                    add(gradient)
            except Exception as error:  # the training step goes on whatever fails here
                self.failed[term.name] = f"{type(error).__name__}: {error}"

        return prehook

    def _by_example(self, term: SharedTerm, rows: Tensor) -> Tensor:
        """(rows, p) -> (B, T, p)."""
        if term.positions_first:
            return rows.view(-1, self.size, rows.shape[1]).transpose(0, 1)
        return rows.view(self.size, -1, rows.shape[1])

    def _use(self, term: SharedTerm, node: Any, kind: str, gradient: Tensor, *, turned: bool) -> _Use:
        if kind == "Embedding":
            tokens, padding = node._saved_indices, node._saved_padding_idx
            if term.positions_first:
                tokens, gradient = tokens.transpose(0, 1), gradient.transpose(0, 1)
            rows, width = _shape_below(node, 0)
            table = SimpleNamespace(
                num_embeddings=rows, embedding_dim=width, padding_idx=padding if 0 <= padding < rows else None
            )
            return _Use(tokens, gradient, table=table)
        rows = node._saved_mat1 if kind == "Addmm" else node._saved_self
        return _Use(self._by_example(term, rows), self._by_example(term, gradient), turned=turned)


@dataclass(frozen=True)
class _Use:
    """One use of a matrix: the rows (B, T, d), or tokens (B, ...), and the gradient (B, T, p) of the product."""

    rows: Tensor
    gradient: Tensor
    turned: bool = True
    """Whether the matrix is (p, d)."""
    table: Any = None
    """The sizes of the table, if the rows are tokens."""

    def norms(self) -> Tensor:
        """Return the norm of the matrix's gradient, (B,)."""
        if self.table is not None:
            return RULES[nn.Embedding].norms(self.table, (self.rows,), self.gradient, frozenset())
        return product_norms(self.rows, self.gradient)

    def of(self, examples: slice) -> Tensor:
        """Return the gradient of the matrix for some examples, (examples, ...)."""
        rows, gradient = self.rows[examples], self.gradient[examples]
        if self.table is not None:
            return RULES[nn.Embedding].gradient(self.table, (rows,), gradient, "weight")
        rows = rows.to(gradient.dtype)
        return gradient.mT @ rows if self.turned else rows.mT @ gradient


def _norms_of(uses: list[_Use], elements: int) -> Tensor:
    """Return the norm of the sum of several uses' gradients of one matrix, (B,): a few examples at a time."""
    if len(uses) == 1:
        return uses[0].norms()
    step, norms = max(1, WORKSPACE // elements), []
    for start in range(0, len(uses[0].gradient), step):
        total = uses[0].of(slice(start, start + step))
        for use in uses[1:]:
            total = total + use.of(slice(start, start + step))
        norms.append(row_norms(total))
    return torch.cat(norms)


def accumulator(parameter: Tensor) -> Any:
    """Return the node that accumulates a parameter's gradient."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def feeds_of(roots: Iterable[Tensor]) -> dict[Any, list[tuple[Any, int]]]:
    """Return, for every node of a graph, the nodes that use its result and the operand that it is."""
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


def meetings(
    leaf: Any, feeds: dict[Any, list[tuple[Any, int]]], known: set[Path] | None
) -> list[tuple[Path, list[Any]]]:
    """Return the paths from a leaf to the nodes that combine it with the examples, and their nodes.

    Only ``known`` paths are followed; None: every view, up to the first operation that is none.
    """
    found: list[tuple[Path, list[Any]]] = []
    ahead: list[tuple[Path, list[Any]]] = [((), [])]
    while ahead:
        path, nodes = ahead.pop()
        for node, operand in feeds.get(nodes[-1] if nodes else leaf, ()):
            longer, with_node = (*path, (operation(node), operand)), [*nodes, node]
            if known is None:
                ends = not _alone(node, operand)
            else:
                ends = longer in known or not any(longer == path[: len(longer)] for path in known)
            (found if ends else ahead).append((longer, with_node))
    return found


def combines(path: Path) -> bool:
    """Return whether the last operation of a path is one whose gradient yields that of each example."""
    before = {name for name, _ in path[:-1]}
    return path[-1] in _COMBINES and (path[-1] not in PRODUCTS or before <= {"T"})


def _alone(node: Any, operand: int) -> bool:
    """Return whether a node combines its operand with nothing that has gradients, and adds no examples."""
    if operation(node) in _VIEWS:
        return True
    others = [following for k, (following, _) in enumerate(node.next_functions) if k != operand]
    same = tuple(node._input_metadata[0].shape) == tuple(_shape_below(node, operand))
    return operation(node) in BROADCASTING and same and not any(others)


def _shape_below(node: Any, operand: int) -> torch.Size:
    """Return the shape of what a node takes as an operand."""
    following, output = node.next_functions[operand]
    return torch.Size(following._input_metadata[output].shape)


def _summed_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum a gradient (B, ...) over everything that an operand of this shape was broadcast over, but the batch."""
    inner = gradient.ndim - 1
    own = shape[-inner:] if inner and len(shape) else torch.Size()
    missing = inner - len(own)
    dims = [1 + k for k in range(missing)] + [1 + missing + k for k, n in enumerate(own) if n == 1]
    summed = gradient.sum(dims, keepdim=True) if dims else gradient
    return summed.reshape(len(gradient), *own)


def _through(nodes: list[Any], path: Path, gradient: Tensor) -> Tensor:
    """Return the gradient before a chain of operations that combine nothing."""
    for node, (_, operand) in reversed(list(zip(nodes, path, strict=False))):
        gradients = node(gradient)
        gradient = gradients if isinstance(gradients, Tensor) else gradients[operand]
    return gradient

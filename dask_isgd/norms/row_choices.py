"""Which parameters meet rows that the values of the inputs choose: unpadded tokens, sorted or routed rows.

What the audit proves of such rows holds for its own examples only: the next batch has other lengths, another order or
other routes. One forward pass is watched, operation by operation. What follows is trusted again if the same indices put
the rows back where they came from (``y[mask] = f(x[mask])``), or if the inverse of a permutation does
(``f(x[order])[order.argsort()]``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TAKES = ("index", "_unsafe_index", "index_select", "gather", "masked_select", "embedding")
_ORDERS = ("sort", "topk", "msort", "_pack_padded_sequence", "_pad_packed_sequence")
_PUTS = (
    *("index_put", "_unsafe_index_put", "_index_put_impl", "index_add", "index_copy", "index_reduce"),
    *("scatter", "scatter_add", "scatter_reduce", "masked_scatter"),
)
_CUTS = ("select", "slice", "split", "split_with_sizes", "unbind", "narrow")
_JOINS = ("cat", "stack")
_SHAPES = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
)
Key = tuple[Any, ...]
"""An index tensor: its storage, and what of it."""

NESTED = "nested"
"""Among the indices that chose rows: one chose among the rows of another, and a single inverse does not undo both."""

_ESCAPES = frozenset([Tensor.tolist, Tensor.numpy, Tensor.__array__])


@dataclass
class _Facts:
    """What is known of one storage."""

    storage: Any
    """Kept, so that its address is not used again."""
    derived: bool = False
    """Whether it depends on the values of the inputs."""
    choices: frozenset[Any] = frozenset()
    """The indices that chose its rows."""
    parameters: frozenset[int] = frozenset()
    """Ids of the parameters that it consists of, and of nothing derived."""
    order: Order | None = None
    """What is known of it as an index."""


@dataclass(frozen=True)
class Order:
    """An index that is made of a permutation."""

    index: Key
    permutation: Key
    """The key of the permutation."""
    kind: Literal["itself", "inverse", "repeats", "counting"] = "itself"
    """``repeats``: a permutation of rows that are repeated k times (``permutation // k``); ``counting``: 0, 1, …"""


class RowChoices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a forward pass over a batch of ``size``, a number that divides no other dimension."""

    def __init__(self, parameters: Iterable[Tensor], size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.met: dict[int, frozenset[Any]] = {}
        """Ids of the parameters that meet chosen rows, and the indices that chose these."""
        self._escaped = False
        self._orders: dict[Key, Order] = {}
        self._facts: dict[int, _Facts] = {}
        for parameter in parameters:
            self._of(parameter).parameters |= {id(parameter)}

    @contextmanager
    def watching(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Watch what is computed of ``inputs`` inside."""
        for tensor in inputs:
            self._of(tensor).derived = True
        with _Escapes(self), self:
            yield

    def escapes(self, tensor: Tensor) -> None:
        """Note that Python has the values of a tensor: indices may come from there."""
        self._escaped = self._escaped or self._of(tensor).derived

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = function._schema.name.rpartition("::")[2].removesuffix("_")
        sources = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        facts = [self._of(tensor) for tensor in sources]
        if name == "_local_scalar_dense":
            self.escapes(sources[0])
            return output
        made_of_values = self._escaped and name in ("lift_fresh", "lift_fresh_copy")
        derived = (name not in _SHAPES and any(f.derived for f in facts)) or made_of_values
        choices = frozenset[Any]().union(*(f.choices for f in facts)) if derived else frozenset[Any]()
        own, restored = self._choice(name, args, output)
        choices = (choices | own) - restored
        names = frozenset[int]().union(*(f.parameters for f in facts if not f.derived))
        if name not in _PUTS and (chose := frozenset[Any]().union(*(f.choices for f in facts))):
            self.met |= {number: self.met.get(number, frozenset()) | chose for number in names}
        order = self._order(name, args, output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                found = self._of(tensor)
                found.derived |= derived
                found.choices = (found.choices | choices) - restored
                found.parameters = frozenset() if found.derived else found.parameters | names
                found.order = order if order is not None and order.index == key_of(tensor) else None
        return output

    def _order(self, name: str, args: Any, output: Any) -> Order | None:
        """Return what is known of an operation's result as an index."""
        if name in ("arange", "sort"):
            permutation = output[1] if name == "sort" else output
            key = key_of(permutation)
            if name == "arange":
                return Order(key, key, "counting") if len(args) == 1 else None
            if args[0].ndim != 1:
                return None
            before = self._order_of(args[0])
            return Order(key, before.permutation, "inverse") if before is not None else Order(key, key)
        if name == "floor_divide" and isinstance(args[1], int) and (before := self._order_of(args[0])) is not None:
            return Order(key_of(output), before.permutation, "repeats")
        if name == "index_put" and len(args[1]) == 1 and isinstance(args[1][0], Tensor):
            before, values = self._order_of(args[1][0]), self._of(args[2]).order
            counts = values is not None and values.kind == "counting" and values.index == key_of(args[2])
            if before is not None and counts and args[0].shape == args[1][0].shape == args[2].shape:
                return Order(key_of(output), before.permutation, "inverse")
        return None

    def _order_of(self, index: Tensor) -> Order | None:
        """Return what is known of an index that is a permutation itself."""
        order = self._of(index).order
        return order if order is not None and order.kind == "itself" and order.index == key_of(index) else None

    def _choice(self, name: str, args: Any, output: Any) -> tuple[frozenset[Any], frozenset[Any]]:
        """Return the indices by which an operation chooses rows, and those whose choice it undoes."""
        none: frozenset[Any] = frozenset()
        if name in _JOINS:  # of rows that were cut before Python had the values by which it now orders them
            joins = self._escaped and self._is_rows(output, args[1] if len(args) > 1 else 0)
            return (frozenset(["Python"]) if joins and all(self._of(t).derived for t in args[0]) else none), none
        if not args or not isinstance(args[0], Tensor) or name not in (*_TAKES, *_ORDERS, *_PUTS, *_CUTS):
            return none, none
        target = args[0]
        if name in _CUTS:
            same = isinstance(output, Tensor) and output.ndim == target.ndim and output.shape[0] == target.shape[0]
            place = 2 if name.startswith("split") else 1
            dim = args[place] if len(args) > place else 0
            cuts = self._escaped and self._of(target).derived and not same and self._is_rows(target, dim)
            return (frozenset(["Python"]) if cuts else none), none
        if name in _ORDERS:
            dim = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
            dim = dim if name != "topk" else (args[2] if len(args) > 2 else -1)
            chosen = name.startswith("_pa") or (target.ndim > 1 and self._is_rows(target, dim))
            return (frozenset([name]) if chosen and self._of(target).derived else none), none
        keys = frozenset(key_of(index) for index in self._row_indices(name, args) if self._of(index).derived)
        if name in _TAKES:
            before = self._of(target).choices
            undone = frozenset(choice for choice in before if NESTED not in before and self._undoes(args, choice))
            if not keys or not self._of(target).derived or undone:
                return none, undone
            indices = [index for index in self._row_indices(name, args) if self._of(index).order is not None]
            self._orders |= {key_of(index): self._of(index).order for index in indices}
            return (keys | {NESTED} if before else keys), none
        moved = next((a for a in reversed(args) if isinstance(a, Tensor)), target)
        back = keys & self._of(moved).choices
        return (none if back or not self._of(moved).derived else keys), back

    def _undoes(self, args: Any, choice: Any) -> bool:
        """Return whether ``x[index]`` puts back rows that a permutation chose: the index is its inverse."""
        if not isinstance(args[1], (list, tuple)) or len(args[1]) != 1 or len(args[0]) != len(args[1][0]):
            return False
        index, chosen = self._of(args[1][0]).order, self._orders.get(choice)
        return (
            index is not None
            and index.kind == "inverse"
            and index.index == key_of(args[1][0])
            and chosen is not None
            and chosen.kind in ("itself", "repeats")
            and chosen.permutation == index.permutation
        )

    def _row_indices(self, name: str, args: Any) -> Iterator[Tensor]:
        """Yield the indices of an operation that are along the rows."""
        target = args[0]
        if name.startswith("masked_") or (name == "embedding" and self._is_rows(target, 0)):
            yield args[1]
        elif "index" in name and isinstance(args[1], (list, tuple)):
            dim = 0
            for index in args[1]:
                covered = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
                if index is not None and any(self._is_rows(target, d) for d in range(dim, dim + covered)):
                    yield index
                dim += covered
        elif name != "embedding" and self._is_rows(target, args[1]):
            yield args[2]

    def _is_rows(self, tensor: Tensor, dim: int) -> bool:
        """Return whether a dimension has the examples, with others folded into them or not."""
        return tensor.ndim > 0 and tensor.shape[dim] > 0 and tensor.shape[dim] % self.size == 0

    def _of(self, tensor: Tensor) -> _Facts:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse or nested
            return _Facts(None, derived=True)
        return self._facts.setdefault(storage._cdata, _Facts(storage))


def key_of(index: Tensor) -> Key:
    """Return what tells an index from others as long as both exist."""
    return index.untyped_storage()._cdata, index.storage_offset(), index.shape


class _Escapes(TorchFunctionMode):
    """Notes conversions to Python and numpy, which are no operations of torch."""

    def __init__(self, choices: RowChoices) -> None:
        super().__init__()
        self.choices = choices

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ESCAPES and isinstance(args[0], Tensor):
            self.choices.escapes(args[0])
        return function(*args, **(kwargs or {}))

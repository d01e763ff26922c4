"""What the graph of a forward pass does with each parameter."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from torch import Tensor

from dask_isgd.errors import ModelError
from dask_isgd.norms.graph_nodes import operation

_ELEMENTWISE = """
    Abs Add Addcdiv Addcmul Clamp ClampMax ClampMin Clone Cos Div Erf Exp Expm1 Gelu Lerp Log Log1P Maximum Minimum Mul
    Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Softmax Softplus Sqrt Square Sub Tanh ToCopy Where"""
_PRODUCTS = "Addmm Addmv Baddbmm Bmm Dot Mm Mv"
_VIEWS = """
    Alias Cat Expand Flatten Permute Repeat ReshapeAlias Select Slice Split SplitWithSizes Squeeze Stack T Transpose
    Unbind Unflatten UnsafeView Unsqueeze View"""
BROADCASTING = frozenset(f"{_ELEMENTWISE} {_PRODUCTS} {_VIEWS}".split())
"""Operations that treat another dimension in front as one more that broadcasts, or raise an exception."""

UNCHECKED = frozenset(["WeightNormInterface"])
"""Operations that do not check the shapes that they get, and crash the process."""


class Graph:
    """The graph that a tensor was computed by; ModelError if reentrant checkpoints hide a part of it."""

    def __init__(self, root: Tensor) -> None:
        self.nodes: dict[Any, None] = {}
        """Every node but those that accumulate gradients, from the root on."""
        self.uses: Counter[int] = Counter()
        """The edges into each parameter's node, by the parameter's id."""
        self._feeds: defaultdict[Any, list[Any]] = defaultdict(list)
        self._leaves: dict[int, Any] = {}
        ahead = [root.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in self.nodes:
                continue
            self.nodes[node] = None
            for following, _ in node.next_functions:
                if following is None:
                    continue
                self._feeds[following].append(node)
                if hasattr(following, "variable"):
                    self.uses[id(following.variable)] += 1
                    self._leaves[id(following.variable)] = following
                else:
                    ahead.append(following)
        if any(operation(node) == "CheckpointFunction" for node in self.nodes):
            raise ModelError(
                "got a model with reentrant checkpoints (torch.utils.checkpoint), of which torch computes no gradients "
                "but those of a whole training step: there are no norms of single examples. Wanted use_reentrant=False"
            )
        self._unchecked = self._below([node for node in self.nodes if operation(node) in UNCHECKED])

    def broadcasts(self, parameter: Tensor) -> bool:
        """Return whether the parameter meets broadcasting operations only: one copy per example may take its place."""
        leaf = self._leaves.get(id(parameter))
        if leaf is None or leaf in self._unchecked:
            return False
        ahead, seen = list(self._feeds[leaf]), set()
        while ahead:
            node = ahead.pop()
            if operation(node) not in BROADCASTING:
                return False
            if node not in seen and len(node.next_functions) == 1:  # nothing but the parameter has entered yet
                ahead += self._feeds[node]
            seen.add(node)
        return True

    def _below(self, nodes: list[Any]) -> set[Any]:
        found: set[Any] = set()
        ahead = list(nodes)
        while ahead:
            node = ahead.pop()
            if node is not None and node not in found:
                found.add(node)
                ahead += [following for following, _ in node.next_functions]
        return found

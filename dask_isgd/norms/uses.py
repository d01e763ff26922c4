"""One use of a parameter: the gradients (B, ...) of the examples, or the factors that they are a product of.

Factors yield the norms at less cost than the gradients themselves.

Shapes: B examples, T positions, d inputs, p outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dask_isgd.norms.rules import RULES
from dask_isgd.norms.rules.linear import product_norms
from dask_isgd.norms.tensor_trees import row_norms


class Use(Protocol):
    """One use of what is shared, at one meeting."""

    def norms(self) -> Tensor:
        """Return the norm of each example's gradient, (B,) float32 or wider."""

    def of(self, examples: slice) -> Tensor:
        """Return the gradients of some examples, (examples, ...)."""


@dataclass(frozen=True)
class Gradients:
    """The gradients themselves, (B, ...)."""

    each: Tensor

    def norms(self) -> Tensor:
        return row_norms(self.each)

    def of(self, examples: slice) -> Tensor:
        return self.each[examples]


@dataclass(frozen=True)
class Product:
    """A matrix (d, p) that rows (B, T, d) are multiplied by, and the gradients (B, T, p) of the products."""

    rows: Tensor
    gradients: Tensor

    def norms(self) -> Tensor:
        return product_norms(self.rows, self.gradients)

    def of(self, examples: slice) -> Tensor:
        gradients = self.gradients[examples]
        return self.rows[examples].mT.to(gradients.dtype) @ gradients


@dataclass(frozen=True)
class Lookup:
    """A table (rows, d), tokens (B, ...) that are looked up in it, and the gradients (B, ..., d) of what is found."""

    rows: int
    padding: int | None
    tokens: Tensor
    gradients: Tensor

    @property
    def _table(self) -> Any:
        width = self.gradients.shape[-1]
        return SimpleNamespace(num_embeddings=self.rows, embedding_dim=width, padding_idx=self.padding)

    def norms(self) -> Tensor:
        return RULES[nn.Embedding].norms(self._table, (self.tokens,), self.gradients, frozenset())

    def of(self, examples: slice) -> Tensor:
        saved = (self.tokens[examples],)
        return RULES[nn.Embedding].gradient(self._table, saved, self.gradients[examples], "weight")


@dataclass(frozen=True)
class Kernel:
    """The weight of a convolution, its input (B, C, ...) and the gradients of its output (B, O, ...)."""

    layer: Any
    inputs: Tensor
    gradients: Tensor

    @property
    def _rule(self) -> Any:
        return RULES[nn.ConvTranspose2d if self.layer.transposed else nn.Conv2d]

    def norms(self) -> Tensor:
        return self._rule.norms(self.layer, (self.inputs,), self.gradients, frozenset(["weight"]))  # type: ignore[no-any-return]

    def of(self, examples: slice) -> Tensor:
        return self._rule.gradient(self.layer, (self.inputs[examples],), self.gradients[examples], "weight")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stack:
    """A stack (G, d, p) of matrices, each multiplied by rows of its own: (G B, T, d), with gradients (G B, T, p)."""

    matrices: Product
    count: int

    def norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.matrices.norms().reshape(self.count, -1), dim=0)
        return norms

    def of(self, examples: slice) -> Tensor:
        x, d = self._by_matrix(self.matrices.rows), self._by_matrix(self.matrices.gradients)
        return (x[:, examples].mT.to(d.dtype) @ d[:, examples]).transpose(0, 1)

    def _by_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.count, len(tensor) // self.count, *tensor.shape[1:])

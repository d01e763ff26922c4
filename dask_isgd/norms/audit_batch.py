"""A few examples of the user's own data, with autograd's norms of two of them: plans are proved on these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dask_isgd.norms.capture import Capture, fast_pass
from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.coupling import agree
from dask_isgd.norms.graph_reader import SharedTerm
from dask_isgd.norms.model_state import set_random_state
from dask_isgd.norms.per_example_copies import Shape
from dask_isgd.norms.tensor_trees import Loss, first_line, tensors

LayerParameters = dict[str, dict[str, str]]
"""Layers with a rule, by name: their parameters, own name -> name in the model."""


@dataclass(frozen=True)
class AuditBatch:
    """The audit's batch, and autograd's norms of two of its examples."""

    model: nn.Module
    loss: Loss
    inputs: Any
    targets: Any
    size: int
    random: list[Tensor]
    """The random state before the first pass."""
    parameters: LayerParameters
    reference: dict[int, dict[str, Tensor]]
    """Example -> parameter -> squared norm."""

    def mismatches(
        self, layers: tuple[CapturedLayer, ...], copies: Mapping[str, Shape], shared: tuple[SharedTerm, ...] = ()
    ) -> tuple[Capture, dict[str, str]]:
        """Run a fast pass; return its capture and the parameters whose norms are not autograd's, with the reason."""
        set_random_state(self.model, self.random)
        names = {
            layer.name: [self.parameters[layer.name][key] for key in (*layer.unshared, *layer.shared)]
            for layer in layers
        }
        try:
            capture, _ = fast_pass(
                self.model, self.loss, self.inputs, self.targets, layers, copies, self.size, shared=shared
            )
        except Exception as error:  # a model may raise anything at a shape that it does not expect
            if not (layers or copies or shared):
                raise
            reason = f"the fast pass fails ({type(error).__name__}: {first_line(error)})"
            served = [name for group in names.values() for name in group]
            served += [term.name for term in shared]
            return Capture(self.model, (), self.size), dict.fromkeys([*served, *copies], reason)
        names |= {term.name: [term.name] for term in shared}
        wrong = {name: reason for layer, reason in capture.changed.items() for name in names.get(layer, ())}
        groups = self._terms(layers, copies) | {term.name: [term.name] for term in shared}
        for term, group in groups.items():
            mismatch = self._mismatch(capture.terms.get(term), group)
            if mismatch is not None:
                wrong |= {name: mismatch for name in group if name not in wrong}
        return capture, wrong

    def _terms(self, layers: tuple[CapturedLayer, ...], copies: Mapping[str, Shape]) -> dict[str, list[str]]:
        """Return the parameters, by their names in the model, that each term of a capture covers."""
        terms = {layer.name: [self.parameters[layer.name][key] for key in layer.unshared] for layer in layers}
        terms |= {name: [name] for layer in layers for name in layer.shared.values()}
        return terms | {name: [name] for name in copies}

    def _mismatch(self, term: Tensor | None, names: list[str]) -> str | None:
        """Return how a term (B,) of the norms differs from autograd's over the parameters ``names``, if it does."""
        for k, squares in self.reference.items():
            wanted = sum(float(squares[name]) for name in names)
            got = float(term[k]) ** 2 if term is not None else 0.0
            # Norms below 1e-18 leave the range of float32 when squared.
            floor = 1e-36 + 1e-6 * sum(float(square) for square in squares.values())
            if not agree(got, wanted, self.inputs, self.model, floor=floor):
                return f"its rule gives {got**0.5:.6g}, autograd gives {wanted**0.5:.6g}"
        return None


def unique_size(model: nn.Module, inputs: Any) -> int:
    """Return a small batch size that divides no other dimension, so that a layer without the batch first shows."""
    taken: set[int] = {n for parameter in model.parameters() for n in parameter.shape}
    taken |= {n for tensor in tensors(inputs) for n in tensor.shape[1:]}
    primes = (5, 7, 11, 13, 17, 19, 23, 29, 31)
    apart = (size for size in primes if all(n % size for n in taken if n))
    return next(apart, next(size for size in range(5, 1000, 2) if size not in taken))

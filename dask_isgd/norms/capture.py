"""Hooks that compute each layer's term of the norms when its gradient arrives.

A forward hook saves what the layer's rule needs of the input; a tensor hook on the output passes the
gradient to the rule and releases both. No gradient of a weight's size is formed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.graph_reader import GraphReader, SharedTerm
from dask_isgd.norms.later_batches import nodes_created
from dask_isgd.norms.model_state import frozen
from dask_isgd.norms.per_example_copies import Shape, expanded
from dask_isgd.norms.rules import Rule, Saved, rule_of
from dask_isgd.norms.tensor_trees import Loss, autocast_on, call, checked_losses, row_norms, wide

WORKSPACE = 1 << 24
"""Elements of materialised gradients at a time (64 MB in float32)."""


@dataclass
class Call:
    """One call of a layer, until its gradient has arrived."""

    layer: CapturedLayer
    rule: Rule
    module: nn.Module
    saved: Saved
    versions: tuple[int, ...]
    """Version counters of the saved tensors: they reveal a change in place."""
    shape: torch.Size
    """Shape of the output."""


class Capture:
    """The terms of one forward and backward pass.

    Forward passes between :meth:`open` and :meth:`close` are captured while ``recording`` is True. Turn it off
    before backward: a checkpointed layer runs again there, and that is not a second use of its parameters.
    """

    def __init__(self, model: nn.Module, layers: tuple[CapturedLayer, ...], size: int) -> None:
        self.model = model
        self.layers = layers
        self.size = size
        self.recording = False
        self.calls: list[tuple[str, int]] = []
        """(layer, dimensions of its output) of each call, in order."""
        self.arrived: list[int] = []
        """Indices of the calls whose gradient has arrived."""
        self.changed: dict[str, str] = {}
        """Layers whose terms cannot be computed, and why."""
        self.terms: dict[str, Tensor] = {}
        """Norms by layer, or by parameter if it is shared: (B,) each."""
        self.nodes = 0
        """Graph nodes that the forward pass created."""
        self._anchor: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._summands: dict[str, list[tuple[Call, str, Tensor]]] = {}

    def open(self) -> None:
        """Register the hooks."""
        for layer in self.layers:
            module = self.model.get_submodule(layer.name)
            rule = rule_of(module)
            assert rule is not None
            hook = partial(self._forward_hook, layer, rule, frozenset(layer.shared))
            # First among the hooks: the layer's own output, not what a user's hook makes of it.
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def close(self) -> None:
        """Remove the hooks."""
        self.recording = False
        while self._handles:
            self._handles.pop().remove()

    @property
    def anchor(self) -> Tensor:
        """A tensor that backward must reach in a model whose parameters are frozen."""
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True)
        return self._anchor

    def _forward_hook(
        self,
        layer: CapturedLayer,
        rule: Rule,
        shared: frozenset[str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if not (self.recording and torch.is_grad_enabled()):
            return None
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        if not (layer.layout.fits(x.shape, self.size) and layer.layout.fits(output.shape, self.size)):
            self.changed[layer.name] = f"its output has shape {tuple(output.shape)}, not {layer.layout.value}"
            return None
        x = layer.layout.batch_first(x.detach(), self.size)
        saved = rule.save(module, x, layer.unshared, shared)
        call = Call(layer, rule, module, saved, tuple([tensor._version for tensor in saved]), output.shape)
        index = len(self.calls)
        self.calls.append((layer.name, output.ndim))
        point, replaced = gradient_point(output), False
        if not point.requires_grad:
            # The first layer of a frozen model: nothing before it needs a gradient, but backward must reach it.
            point, replaced = _Anchored.apply(point, self.anchor), True  # type: ignore[no-untyped-call]
        point.register_hook(partial(self._gradient_hook, index, call))  # type: ignore[no-untyped-call]
        return point.view(call.shape) if replaced else None

    def _gradient_hook(self, index: int, call: Call, gradient: Tensor | None) -> None:
        saved, call.saved = call.saved, ()
        if gradient is None:
            return
        self.arrived.append(index)
        if call.versions != tuple([tensor._version for tensor in saved]):
            self.changed[call.layer.name] = "its input is changed in place after the call"
            return
        if autocast_on(gradient.device.type):  # for the user's forward pass; norms have the dtype of its results
            with torch.autocast(gradient.device.type, enabled=False):
                self._add_call(call, saved, gradient.detach())
        else:
            self._add_call(call, saved, gradient.detach())

    def _add_call(self, call: Call, saved: Saved, gradient: Tensor) -> None:
        layer = call.layer
        if gradient.shape != call.shape:
            gradient = gradient.reshape(call.shape)
        gradient = layer.layout.batch_first(gradient, self.size)
        if layer.unshared:
            self._add_term(layer.name, call.rule.norms(call.module, saved, gradient, layer.unshared))
        for own, name in layer.shared.items():
            self._summands.setdefault(name, []).append((replace(call, saved=saved), own, gradient))

    def _add_term(self, key: str, term: Tensor) -> None:
        self.terms[key] = torch.hypot(self.terms[key], term) if key in self.terms else term

    def finish(self) -> None:
        """Sum the gradients of shared parameters over their calls, a slice of examples at a time."""
        summands, self._summands = self._summands, {}
        if not summands:
            return
        with torch.no_grad():
            for name, uses in summands.items():
                size = len(uses[0][2])
                step = max(1, WORKSPACE // max(1, self.model.get_parameter(name).numel()))
                norms = []
                for start in range(0, max(size, 1), step):
                    rows = slice(start, start + step)
                    total: Tensor | None = None
                    for call, own, gradient in uses:
                        saved = tuple(tensor[rows] for tensor in call.saved)
                        term = call.rule.gradient(call.module, saved, gradient[rows], own)
                        total = term if total is None else total + term
                    assert total is not None
                    norms.append(row_norms(total))
                self._add_term(name, torch.cat(norms))

    def squares(self, size: int, device: torch.device) -> Tensor:
        """Return the sum of the squares of all terms, (B,) float64."""
        terms = [term if term.device == device else term.to(device) for term in self.terms.values()]
        stacked = torch.stack(terms) if terms else torch.zeros(1, size, device=device)
        return stacked.to(wide(stacked)).square_().sum(0)


def fast_pass(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    layers: tuple[CapturedLayer, ...],
    copies: Mapping[str, Shape],
    size: int,
    *,
    shared: tuple[SharedTerm, ...] = (),
    only: int | None = None,
) -> tuple[Capture, Tensor]:
    """Run one forward and backward pass that forms no weight gradient; return its capture and the losses (B,).

    ``shared`` are read off the graph. With ``only``, the backward pass is of that example's loss alone.
    """
    capture = Capture(model, layers, size)
    reader = GraphReader(model, shared, size, deferred=True)
    with frozen(model, but=[term.name for term in shared]), expanded(model, copies, size) as leaves:
        try:
            capture.open()
            capture.recording = True
            before = nodes_created()
            output = call(model, inputs)
            capture.recording = False
            losses = checked_losses(loss, output, targets, size)
            capture.nodes = nodes_created() - before
            if losses.requires_grad:
                reader.find([losses])
                points: list[Tensor] = [capture.anchor, *leaves.values()]
                edges = reader.edges(points)
                summed = losses.sum() if only is None else losses[only]
                goals: Any = [*points, *edges]
                _, *gradients = torch.autograd.grad(summed, goals, allow_unused=True)
                reader.deliver(edges, gradients[len(leaves) :])
                for name, gradient in zip(leaves, gradients, strict=False):
                    if gradient is not None:
                        capture.terms[name] = row_norms(gradient)
            capture.finish()
            capture.terms |= {name: square.sqrt() for name, square in reader.by_term().items()}
            if not reader.complete:
                capture.changed |= reader.failed or {"": "a gradient of what the examples share did not arrive"}
        finally:
            capture.close()
            reader.close()
    return capture, losses.detach()


def gradient_point(output: Tensor) -> Tensor:
    """Return the tensor that has the output's gradient and whose hooks survive later operations.

    Linear returns a view of a matrix for inputs of three and more dimensions. An in-place activation on a
    view rewrites the view's history, so that a hook on it never fires; a hook on the matrix does.
    """
    base = output._base
    if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return base
    return output


class _Anchored(torch.autograd.Function):
    """The identity, in place (no copy, and an in-place activation may follow), that backward must reach."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None

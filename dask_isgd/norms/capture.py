"""Hooks that take each layer's term of the norms as its gradient arrives.

A forward hook keeps what the layer's rule needs of the input; a tensor hook on the output hands the
gradient to the rule and lets both go. No gradient of a weight's size is formed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dask_isgd.norms.batch_layouts import Layout
from dask_isgd.norms.model_state import frozen
from dask_isgd.norms.per_example_copies import Shape, expanded
from dask_isgd.norms.rules import Kept, Rule, rule_of
from dask_isgd.norms.tensor_trees import Loss, autocast_on, call, checked_losses, row_norms, wide

WORKSPACE = 1 << 24
"""Elements of materialised gradients at a time (64 MB in float32)."""


@dataclass(frozen=True)
class Site:
    """A layer whose rule serves some of its parameters."""

    layer: str
    """The module's name in the model."""
    alone: frozenset[str] = frozenset()
    """Its parameters that nothing else uses: the rule gives their norms at the call."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Its parameters used at several calls, by their names in the model: gradients are summed first."""
    layout: Layout = Layout.FIRST
    """Where the batch is in its input and output."""


@dataclass
class Call:
    """One call of a layer, until its gradient has arrived."""

    site: Site
    rule: Rule
    module: nn.Module
    kept: Kept
    versions: tuple[int, ...]
    shape: torch.Size


class Capture:
    """The terms of one forward and backward pass.

    Forward passes between :meth:`open` and :meth:`close` are captured while ``recording`` is True. Turn it off
    before backward: a checkpointed layer runs again there, and that is no second use of its parameters.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...], size: int) -> None:
        self.model = model
        self.sites = sites
        self.size = size
        self.recording = False
        self.calls: list[tuple[str, int]] = []
        """(layer, dimensions of its output) of each call, in order."""
        self.fired: list[int] = []
        """The calls whose gradient has arrived."""
        self.changed: dict[str, str] = {}
        """Layers whose terms can't be had, and why."""
        self.terms: dict[str, Tensor] = {}
        """Norms by layer, or by parameter where it is shared: (B,) each."""
        self._anchor: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._summands: dict[str, list[tuple[Call, str, Tensor]]] = {}

    def open(self) -> None:
        for site in self.sites:
            module = self.model.get_submodule(site.layer)
            rule = rule_of(module)
            assert rule is not None
            called = partial(self._called, site, rule, frozenset(site.shared))
            # First among the hooks: the layer's own output, not what a user's hook makes of it.
            self._handles.append(module.register_forward_hook(called, prepend=True, with_kwargs=True))

    def close(self) -> None:
        self.recording = False
        while self._handles:
            self._handles.pop().remove()

    @property
    def anchor(self) -> Tensor:
        """What backward must reach in a model whose parameters are frozen."""
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True)
        return self._anchor

    def _called(
        self,
        site: Site,
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
        x = site.layout.first(x.detach(), self.size)
        kept = rule.keep(module, x, site.alone, shared)
        call = Call(site, rule, module, kept, tuple([tensor._version for tensor in kept]), output.shape)
        index = len(self.calls)
        self.calls.append((site.layer, output.ndim))
        point, entered = gradient_point(output), False
        if site.layout.shared:
            point, entered = site.layout.first(output, self.size).clone(), True
            call.shape = point.shape
        if not point.requires_grad:
            # The first layer of a frozen model: nothing before it needs a gradient, backward must still reach it.
            point, entered = _Entry.apply(point, self.anchor), True  # type: ignore[no-untyped-call]
        point.register_hook(partial(self._arrived, index, call))  # type: ignore[no-untyped-call]
        return point.view(call.shape) if entered else None

    def _arrived(self, index: int, call: Call, gradient: Tensor | None) -> None:
        kept, call.kept = call.kept, ()
        if gradient is None:
            return
        layer = call.site.layer
        self.fired.append(index)
        if call.versions != tuple([tensor._version for tensor in kept]):
            self.changed[layer] = "its input is changed in place after the call"
            return
        if autocast_on(gradient.device.type):  # the user's forward pass is; norms are taken in what it gave
            with torch.autocast(gradient.device.type, enabled=False):
                self._take(call, kept, gradient.detach())
        else:
            self._take(call, kept, gradient.detach())

    def _take(self, call: Call, kept: Kept, gradient: Tensor) -> None:
        layer, alone = call.site.layer, call.site.alone
        if gradient.shape != call.shape:
            gradient = gradient.reshape(call.shape)
        if not call.site.layout.shared:
            gradient = call.site.layout.first(gradient, self.size)
        if alone:
            self._add(layer, call.rule.norms(call.module, kept, gradient, alone))
        for own, name in call.site.shared.items():
            self._summands.setdefault(name, []).append((_with(call, kept), own, gradient))

    def _add(self, key: str, term: Tensor) -> None:
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
                    part = slice(start, start + step)
                    total: Tensor | None = None
                    for call, own, gradient in uses:
                        kept = tuple(tensor[part] for tensor in call.kept)
                        term = call.rule.gradient(call.module, kept, gradient[part], own)
                        total = term if total is None else total + term
                    assert total is not None
                    norms.append(row_norms(total))
                self._add(name, torch.cat(norms))

    def squares(self, size: int, device: torch.device) -> Tensor:
        """Σ of the squares of all terms: (B,) float64."""
        terms = [term if term.device == device else term.to(device) for term in self.terms.values()]
        stacked = torch.stack(terms) if terms else torch.zeros(1, size, device=device)
        return stacked.to(wide(stacked)).square_().sum(0)


def fast_pass(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    sites: tuple[Site, ...],
    copies: Mapping[str, Shape],
    size: int,
    *,
    only: int | None = None,
) -> tuple[Capture, Tensor]:
    """One forward and backward pass that forms no weight gradient: the terms, and the losses (B,).

    With ``only``, of that example's loss alone.
    """
    capture = Capture(model, sites, size)
    with frozen(model), expanded(model, copies, size) as leaves:
        try:
            capture.open()
            capture.recording = True
            output = call(model, inputs)
            capture.recording = False
            losses = checked_losses(loss, output, targets, size)
            if losses.requires_grad:
                points = [capture.anchor, *leaves.values()]
                summed = losses.sum() if only is None else losses[only]
                _, *gradients = torch.autograd.grad(summed, points, allow_unused=True)
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        capture.terms[name] = row_norms(gradient)
            capture.finish()
        finally:
            capture.close()
    return capture, losses.detach()


def gradient_point(output: Tensor) -> Tensor:
    """The tensor whose gradient is the output's and whose hooks survive what comes next.

    Linear returns a view of a matrix for inputs of three and more dimensions. An in-place activation on a
    view rewrites the view's history, so that a hook on it never fires; a hook on the matrix does.
    """
    base = output._base
    if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return base
    return output


class _Entry(torch.autograd.Function):
    """The identity, in place (no copy, and an in-place activation may follow), that backward must reach."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _with(call: Call, kept: Kept) -> Call:
    return Call(call.site, call.rule, call.module, kept, call.versions, call.shape)

"""Which parameters the fast rules serve: proved on a few examples of the user's own data.

A rule sees calls of its module and nothing else, so for each parameter the audit checks that

- autograd's graph reaches it as often as captured calls explain (no use outside the module's calls);
- the module's output has the batch first, and example k's loss depends on row k only;
- the rule's norms of two examples are autograd's.

A parameter that fails is served by the fallback, with the reason. If examples depend on each other in the
whole model, they have no gradient of their own: ModelError.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dask_isgd.errors import ModelError
from dask_isgd.norms.batch_layouts import BatchLayout, possible_layouts
from dask_isgd.norms.capture import Capture, fast_pass
from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.coupling import (
    agree,
    check_inputs_independent,
    check_losses_independent,
    check_others_irrelevant,
)
from dask_isgd.norms.fallback import parameter_squares, squares_by_loop, squares_by_vmap
from dask_isgd.norms.graph_trace import GraphTrace, layers_with_rules, trace_graph
from dask_isgd.norms.model_state import random_state, set_random_state, trainable
from dask_isgd.norms.per_example_copies import Shape, copy_shapes
from dask_isgd.norms.shared_terms import find_shared
from dask_isgd.norms.tensor_trees import Loss, take, tensors
from dask_isgd.norms.training_graph import SharedTerm

logger = logging.getLogger("dask_isgd.norms")

CHOSEN = "the values of the inputs choose the rows that it meets, as in x[mask]"

LayerParameters = dict[str, dict[str, str]]
"""Layers with a rule, by name: their parameters, own name -> name in the model."""


@dataclass(frozen=True)
class NormPlan:
    """How the norms of one model are computed."""

    layers: tuple[CapturedLayer, ...]
    copies: Mapping[str, Shape]
    """Parameters replaced with one copy per example, and the copy's shape."""
    shared: tuple[SharedTerm, ...]
    """Parameters read off the graph where they meet the examples."""
    calls: tuple[tuple[str, int], ...]
    """(layer, dimensions of its output) of every call that a pass must make, in order."""
    arrived: frozenset[int]
    """Indices of the calls whose gradient must arrive."""
    fallback: tuple[str, ...]
    """Parameters whose gradients are computed one example at a time."""
    by_vmap: bool
    """Whether the fallback uses vmap, not a loop."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each parameter of the fallback is there."""
    size: int = 0
    """The number of examples in the audit's batch."""
    deterministic: bool = True
    """Whether the model draws no random numbers in its mode."""
    conclusive: bool = True
    """False if the audit's losses were not finite: it must be repeated on the next batch."""

    def matches(self, capture: Capture, size: int) -> bool:
        """Return whether a pass over ``size`` examples made the calls that the audit proved."""
        return (
            tuple(capture.calls) == self.calls
            and self.arrived == set(capture.arrived)
            and not capture.changed
            and all(term.shape == (size,) for term in capture.terms.values())
        )

    def same_as(self, other: NormPlan) -> bool:
        """Return whether two audits came to the same result."""
        served = self.layers, self.copies, self.shared, self.fallback, self.calls, self.arrived
        return served == (other.layers, other.copies, other.shared, other.fallback, other.calls, other.arrived)

    @property
    def forward_unchanged(self) -> bool:
        """Whether an ordinary training step yields all the norms, without replacing any of its tensors."""
        return not (self.fallback or self.copies or any(layer.layout.shared for layer in self.layers))


@dataclass(frozen=True)
class _AuditBatch:
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
            served += [name for term in shared for name in term.names]
            return Capture(self.model, (), self.size), dict.fromkeys([*served, *copies], reason)
        names |= {term.name: list(term.names) for term in shared}
        wrong = {name: reason for layer, reason in capture.changed.items() for name in names.get(layer, ())}
        groups = self._terms(layers, copies) | {term.name: list(term.names) for term in shared}
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


def audit(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    *,
    rows: Tensor | None = None,
    whole: bool = False,
    training: bool = False,
    reads: bool = True,
) -> NormPlan:
    """Return the plan for a model in its current mode; must be called inside ``preserved``.

    ``rows`` are the examples to use, all of them in order unless given; the audit takes the first few of them, or
    (``whole``) the batch as it is. ``training``: the plan is that of a training step, which has no fallback.
    ``reads``: whether parameters may be read off the graph.

    Raises ModelError for a loss of the wrong shape, for examples that depend on each other, and for a loss
    that no trainable parameter reaches.
    """
    parameters = trainable(model)
    if not parameters:
        raise ModelError("got a model without a trainable parameter, wanted at least one with requires_grad=True")
    size = _unique_size(model, inputs)
    given = torch.arange(len(tensors(inputs)[0])) if rows is None else rows
    size = len(given) if whole else size
    rows = given[torch.arange(size) % len(given)]
    inputs, targets = take(inputs, rows), take(targets, rows)
    before = random_state(model)
    trace = trace_graph(model, loss, inputs, targets, size)
    deterministic = all(torch.equal(a, b) for a, b in zip(before, random_state(model), strict=True))
    examples = trace.losses.detach().nan_to_num(0).topk(2).indices.tolist()
    values = list(parameters.values())
    reference = {
        k: dict(zip(parameters, parameter_squares(trace.losses[k], values, retain=True), strict=True)) for k in examples
    }
    check_inputs_independent(model, loss, inputs, targets)
    if deterministic:
        check_losses_independent(model, loss, inputs, targets, trace.losses.detach(), examples)
    if deterministic or not trace.chosen:  # masks of dropout on chosen rows depend on how many there are
        check_others_irrelevant(model, loss, inputs, targets, examples[0])
    batch = _AuditBatch(model, loss, inputs, targets, size, before, layers_with_rules(model), reference)
    layers, copies, shared, capture, reasons = _served(
        batch, trace, list(parameters), training=training, reads=reads and not training, deterministic=deterministic
    )
    fallback = tuple(name for name in parameters if name in reasons)
    by_vmap, loop_reason = False, ""
    if fallback and not training:
        by_vmap, loop_reason = _vmap_fits(batch, fallback, examples, deterministic=deterministic)
        _log_fallback(model, reasons, loop_reason)
    return NormPlan(
        layers=layers,
        copies=copies,
        shared=shared,
        calls=tuple(capture.calls),
        arrived=frozenset(capture.arrived),
        fallback=fallback,
        by_vmap=by_vmap,
        reasons=reasons,
        size=size,
        deterministic=deterministic,
        conclusive=bool(torch.isfinite(trace.losses).all()),
    )


def _served(
    batch: _AuditBatch, trace: GraphTrace, names: list[str], *, training: bool, reads: bool, deterministic: bool
) -> tuple[tuple[CapturedLayer, ...], dict[str, Shape], tuple[SharedTerm, ...], Capture, dict[str, str]]:
    """Return layers, copies and shared terms whose norms are autograd's, their pass, and why others are not served."""
    layouts = _layouts(batch, trace)
    reasons = _unexplained(batch, trace, layouts)
    ruled = {name for own in batch.parameters.values() for name in own.values()}
    free = [name for name, why in reasons.items() if name not in ruled and why != CHOSEN and not training]
    copies = _copies(batch, [name for name in free if _copyable(batch.model, trace, name)])
    reasons = {name: reason for name, reason in reasons.items() if name not in copies}
    mixed = {name for layer in trace.mixed if layer not in trace.shapes for name in batch.parameters[layer].values()}
    free = [name for name, why in reasons.items() if why != CHOSEN and name not in mixed]
    shared = _shared(batch, free) if reads else ()
    elsewhere = {name: "read off the graph" for term in shared for name in term.names}
    reasons = {name: reason for name, reason in reasons.items() if name not in elsewhere}
    while True:
        if reasons and not (deterministic or training):
            reason = "dropout is on, and one pass must serve all parameters"
            reasons |= {name: reason for name in names if name not in reasons}
        layers = _captured_layers(batch.parameters, elsewhere | reasons, trace.calls, layouts)
        copies = {name: shape for name, shape in copies.items() if name not in reasons}
        shared = tuple(term for term in shared if reasons.keys().isdisjoint(term.names))
        capture, wrong = batch.mismatches(layers, copies, shared)
        if not wrong:
            return layers, copies, shared, capture, reasons
        reasons |= wrong


def _layouts(batch: _AuditBatch, trace: GraphTrace) -> dict[str, BatchLayout]:
    """Return where the batch is in layers that do not have it first, if autograd agrees."""
    found = {}
    for name, shape in trace.shapes.items():
        for layout in possible_layouts(shape, batch.size):
            keys = frozenset(batch.parameters[name])
            layer = CapturedLayer(name, keys if trace.calls[name] == 1 else frozenset(), {}, layout)
            if layer.unshared and not batch.mismatches((layer,), {})[1]:
                found[name] = layout
                break
    return found


def _copies(batch: _AuditBatch, names: list[str]) -> dict[str, Shape]:
    """Return the parameters that one copy per example can replace, and the copy's shape."""
    found: dict[str, Shape] = {}
    known: dict[tuple[type[nn.Module], str, Shape], list[Shape]] = {}
    for name in names:
        parent, _, key = name.rpartition(".")
        shape = tuple(batch.model.get_parameter(name).shape)
        kind = (type(batch.model.get_submodule(parent)), key, shape)
        if kind not in known:  # parameters of one kind are tried once, and proved together
            known[kind] = [copy for copy in copy_shapes(shape) if not batch.mismatches((), {name: copy})[1]][:1]
        found |= dict.fromkeys([name], *known[kind]) if known[kind] else {}
    return found


def _shared(batch: _AuditBatch, names: list[str]) -> tuple[SharedTerm, ...]:
    """Return the parameters without a rule whose norms can be read off the graph."""
    if not names:
        return ()
    set_random_state(batch.model, batch.random)
    return find_shared(batch.model, batch.loss, batch.inputs, batch.targets, batch.size, names, [])


def _copyable(model: nn.Module, trace: GraphTrace, name: str) -> bool:
    """Return whether copies of a parameter may be tried: some operations crash at shapes that they do not expect."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, ParametrizationList) and trace.graph.broadcasts(model.get_parameter(name))


def _unexplained(batch: _AuditBatch, trace: GraphTrace, layouts: Mapping[str, BatchLayout]) -> dict[str, str]:
    """Return the parameters whose uses no captured calls explain, and why."""
    captured: Counter[str] = Counter()
    ruled: set[str] = set()
    for layer, names in batch.parameters.items():
        for name in names.values():
            captured[name] += trace.calls[layer]
            ruled.add(name)
    reasons = {}
    for name, parameter in trainable(batch.model).items():
        if id(parameter) in trace.chosen:
            reasons[name] = CHOSEN
            continue
        uses = trace.graph.uses[id(parameter)]
        if name not in ruled:
            owner = batch.model.get_submodule(name.rpartition(".")[0])
            reasons[name] = f"no rule for {type(owner).__name__}"
        elif uses != captured[name]:
            reasons[name] = f"used {uses} times, {captured[name]} of them through layers with a rule"
    for layer, reason in trace.mixed.items():
        if layer not in layouts:
            reasons |= {name: reason for name in batch.parameters[layer].values() if name not in reasons}
    return reasons


def _captured_layers(
    parameters: LayerParameters, reasons: dict[str, str], calls: Counter[str], layouts: Mapping[str, BatchLayout]
) -> tuple[CapturedLayer, ...]:
    """Return the layers with a rule, without the parameters that have a reason not to be served."""
    uses: Counter[str] = Counter()
    for layer, names in parameters.items():
        for name in names.values():
            uses[name] += calls[layer]
    layers = []
    for layer, names in parameters.items():
        fast = {key: name for key, name in names.items() if name not in reasons}
        unshared = frozenset(key for key, name in fast.items() if uses[name] <= 1)
        shared = {key: name for key, name in fast.items() if key not in unshared}
        if fast:
            layers.append(CapturedLayer(layer, unshared, shared, layouts.get(layer, BatchLayout.FIRST)))
    return tuple(layers)


def _vmap_fits(
    batch: _AuditBatch, names: tuple[str, ...], examples: list[int], *, deterministic: bool
) -> tuple[bool, str]:
    """Return whether vmap runs this model and agrees with a plain loop on two examples; otherwise, why not.

    With dropout on, the two draw different masks, and are compared in eval mode.
    """
    model, rows = batch.model, torch.tensor(examples)
    inputs, targets = take(batch.inputs, rows), take(batch.targets, rows)
    modes = {module: module.training for module in model.modules()}
    try:
        if not deterministic:
            model.eval()
        wanted, _ = squares_by_loop(model, batch.loss, inputs, targets, names)
        try:
            got, _ = squares_by_vmap(model, batch.loss, inputs, targets, names)
        except Exception as error:  # vmap may raise anything; the loop has none of its restrictions
            return False, f"vmap fails ({type(error).__name__}: {first_line(error)})"
    finally:
        for module, training in modes.items():
            module.training = training
    for a, b in zip(got.tolist(), wanted.tolist(), strict=True):
        if not agree(a, b, inputs, model, floor=1e-36):
            return False, f"vmap gives {a**0.5:.6g}, autograd gives {b**0.5:.6g}"
    return True, ""


def _unique_size(model: nn.Module, inputs: Any) -> int:
    """Return a small batch size that divides no other dimension, so that a layer without the batch first shows."""
    taken: set[int] = {n for parameter in model.parameters() for n in parameter.shape}
    taken |= {n for tensor in tensors(inputs) for n in tensor.shape[1:]}
    primes = (5, 7, 11, 13, 17, 19, 23, 29, 31)
    apart = (size for size in primes if all(n % size for n in taken if n))
    return next(apart, next(size for size in range(5, 1000, 2) if size not in taken))


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return (str(error).splitlines() or [""])[0]


def _log_fallback(model: nn.Module, reasons: dict[str, str], loop_reason: str) -> None:
    if not reasons:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    how = f"by a loop, because {loop_reason}" if loop_reason else "by vmap"
    logger.warning("%s: exact norms are computed one example at a time, %s, for %s", type(model).__name__, how, listed)

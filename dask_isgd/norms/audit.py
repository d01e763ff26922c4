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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dask_isgd.errors import ModelError
from dask_isgd.norms.audit_batch import AuditBatch, LayerParameters, unique_size
from dask_isgd.norms.batch_layouts import BatchLayout, possible_layouts
from dask_isgd.norms.capture import Capture
from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.coupling import check_inputs_independent, check_losses_independent, check_others_irrelevant
from dask_isgd.norms.fallback import parameter_squares, vmap_fits
from dask_isgd.norms.graph_reader import SharedTerm
from dask_isgd.norms.graph_trace import GraphTrace, layers_with_rules, trace_graph
from dask_isgd.norms.model_state import random_state, trainable
from dask_isgd.norms.norm_plan import NormPlan
from dask_isgd.norms.per_example_copies import Shape, copy_shapes
from dask_isgd.norms.shared_terms import shared_terms
from dask_isgd.norms.tensor_trees import Loss, take, tensors

logger = logging.getLogger("dask_isgd.norms")

CHOSEN = "the values of the inputs choose the rows that it meets, as in x[mask]"


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
    size = unique_size(model, inputs)
    given = torch.arange(len(tensors(inputs)[0])) if rows is None else rows
    size = len(given) if whole else size
    rows = given[torch.arange(size) % len(given)]
    inputs, targets = take(inputs, rows), take(targets, rows)
    before = random_state(model)
    trace = trace_graph(model, loss, inputs, targets, size)
    deterministic = all(torch.equal(a, b) for a, b in zip(before, random_state(model), strict=True))
    examples = trace.losses.detach().nan_to_num(0).topk(min(2, size)).indices.tolist()
    values = list(parameters.values())
    reference = {
        k: dict(zip(parameters, parameter_squares(trace.losses[k], values, retain=True), strict=True)) for k in examples
    }
    check_inputs_independent(model, loss, inputs, targets)
    if deterministic:
        check_losses_independent(model, loss, inputs, targets, trace.losses.detach(), examples)
    if deterministic or not trace.chosen:  # masks of dropout on chosen rows depend on how many there are
        check_others_irrelevant(model, loss, inputs, targets, examples[0])
    batch = AuditBatch(model, loss, inputs, targets, size, before, layers_with_rules(model), reference)
    layers, copies, shared, capture, reasons = _served(
        batch, trace, list(parameters), training=training, reads=reads, deterministic=deterministic
    )
    fallback = tuple(name for name in parameters if name in reasons)
    by_vmap, loop_reason = False, ""
    if fallback and not training:
        two = torch.tensor(examples)
        by_vmap, loop_reason = vmap_fits(
            model, loss, take(inputs, two), take(targets, two), fallback, deterministic=deterministic
        )
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
    batch: AuditBatch, trace: GraphTrace, names: list[str], *, training: bool, reads: bool, deterministic: bool
) -> tuple[tuple[CapturedLayer, ...], dict[str, Shape], tuple[SharedTerm, ...], Capture, dict[str, str]]:
    """Return layers, copies and shared terms whose norms are autograd's, their pass, and why others are not served."""
    layouts = _layouts(batch, trace)
    reasons = _unexplained(batch, trace, layouts)
    shared = _read(batch, trace, layouts, reasons) if reads else ()
    elsewhere = {term.name: "read off the graph" for term in shared}
    reasons = {name: reason for name, reason in reasons.items() if name not in elsewhere}
    ruled = {name for own in batch.parameters.values() for name in own.values()}
    free = [name for name, why in reasons.items() if name not in ruled and why != CHOSEN and not training]
    copies = _copies(batch, [name for name in free if _copyable(batch.model, trace, name)])
    reasons = {name: reason for name, reason in reasons.items() if name not in copies}
    while True:
        if reasons and not (deterministic or training):
            reason = "dropout is on, and one pass must serve all parameters"
            reasons |= {name: reason for name in names if name not in reasons}
        layers = _captured_layers(batch.parameters, elsewhere | reasons, trace.calls, layouts)
        copies = {name: shape for name, shape in copies.items() if name not in reasons}
        shared = tuple(term for term in shared if term.name not in reasons)
        capture, wrong = batch.mismatches(layers, copies, shared)
        if not wrong:
            return layers, copies, shared, capture, reasons
        reasons |= wrong


def _layouts(batch: AuditBatch, trace: GraphTrace) -> dict[str, BatchLayout]:
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


def _copies(batch: AuditBatch, names: list[str]) -> dict[str, Shape]:
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


def _read(
    batch: AuditBatch, trace: GraphTrace, layouts: Mapping[str, BatchLayout], reasons: dict[str, str]
) -> tuple[SharedTerm, ...]:
    """Return the terms of parameters that no rule serves, or that several calls use, which a reader reads rightly."""
    mixed = {name for layer in trace.mixed if layer not in trace.shapes for name in batch.parameters[layer].values()}
    uses = _uses(batch.parameters, trace.calls)
    names = [name for name in trainable(batch.model) if name in reasons or uses[name] > 1]
    names = [name for name in names if name not in mixed or reasons.get(name) == CHOSEN]
    terms = shared_terms(batch.model, trace, batch.size, names) if names else ()
    if not terms:
        return ()
    # With the layers that rules serve: the graph records whose routed rows are behind a layer that needs a gradient.
    layers = _captured_layers(batch.parameters, dict.fromkeys(names, "") | reasons, trace.calls, layouts)
    wrong = batch.mismatches(layers, {}, terms)[1]
    terms = tuple(replace(term, positions_first=term.name in wrong and not term.routed) for term in terms)
    while wrong.keys() & {term.name for term in terms}:
        wrong = batch.mismatches(layers, {}, terms)[1]
        terms = tuple(term for term in terms if term.name not in wrong)
    return terms


def _copyable(model: nn.Module, trace: GraphTrace, name: str) -> bool:
    """Return whether copies of a parameter may be tried: some operations crash at shapes that they do not expect."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, ParametrizationList) and trace.graph.broadcasts(model.get_parameter(name))


def _unexplained(batch: AuditBatch, trace: GraphTrace, layouts: Mapping[str, BatchLayout]) -> dict[str, str]:
    """Return the parameters whose uses no captured calls explain, and why."""
    captured = _uses(batch.parameters, trace.calls)
    reasons = {}
    for name, parameter in trainable(batch.model).items():
        if id(parameter) in trace.chosen:
            reasons[name] = CHOSEN
            continue
        uses = trace.graph.uses[id(parameter)]
        if name not in captured:
            owner = batch.model.get_submodule(name.rpartition(".")[0])
            reasons[name] = f"no rule for {type(owner).__name__}"
        elif uses != captured[name]:
            reasons[name] = f"used {uses} times, {captured[name]} of them through layers with a rule"
    for layer, reason in trace.mixed.items():
        if layer not in layouts:
            reasons |= {name: reason for name in batch.parameters[layer].values() if name not in reasons}
    return reasons


def _uses(parameters: LayerParameters, calls: Counter[str]) -> Counter[str]:
    """Return how often each parameter that has a rule is used through calls of its layers."""
    uses: Counter[str] = Counter()
    for layer, names in parameters.items():
        for name in names.values():
            uses[name] += calls[layer]
    return uses


def _captured_layers(
    parameters: LayerParameters, reasons: dict[str, str], calls: Counter[str], layouts: Mapping[str, BatchLayout]
) -> tuple[CapturedLayer, ...]:
    """Return the layers with a rule, without the parameters that have a reason not to be served."""
    uses = _uses(parameters, calls)
    layers = []
    for layer, names in parameters.items():
        fast = {key: name for key, name in names.items() if name not in reasons}
        unshared = frozenset(key for key, name in fast.items() if uses[name] <= 1)
        shared = {key: name for key, name in fast.items() if key not in unshared}
        if fast:
            layers.append(CapturedLayer(layer, unshared, shared, layouts.get(layer, BatchLayout.FIRST)))
    return tuple(layers)


def _log_fallback(model: nn.Module, reasons: dict[str, str], loop_reason: str) -> None:
    if not reasons:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    how = f"by a loop, because {loop_reason}" if loop_reason else "by vmap"
    logger.warning("%s: exact norms are computed one example at a time, %s, for %s", type(model).__name__, how, listed)

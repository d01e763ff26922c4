"""How the norms of a model's training steps are computed: by the rules, and read off the graph for what is shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.audit import CHOSEN, NormPlan, audit
from dask_isgd.norms.batch_layouts import BatchLayout
from dask_isgd.norms.capture import CapturedLayer
from dask_isgd.norms.coupling import agree
from dask_isgd.norms.fallback import parameter_squares
from dask_isgd.norms.graph_trace import layers_with_rules
from dask_isgd.norms.model_state import autocast_without_cache, check_supported, is_compiled, preserved
from dask_isgd.norms.tensor_trees import batch_size, call, detached, take, tensors
from dask_isgd.norms.training_graph import SharedReader, SharedTerm, accumulator, combines, feeds_of, meetings


@dataclass(frozen=True)
class TrainingPlan:
    """The layers that rules serve, and what is read off the graph."""

    layers: NormPlan
    shared: tuple[SharedTerm, ...] = ()

    def same_as(self, other: TrainingPlan) -> bool:
        """Return whether two audits came to the same result."""
        return self.layers.same_as(other.layers) and self.shared == other.shared


def training_plan(
    model: nn.Module, inputs: Any, *, rows: Tensor | None = None, whole: bool = False
) -> tuple[TrainingPlan | None, str]:
    """Return the plan of the model in its current mode, or None and why a training step does not yield its norms.

    ``rows`` and ``whole`` are those of :func:`audit`.
    """
    if is_compiled(model):
        return None, "the model is compiled, and hooks of its layers do not run in compiled code"
    try:
        if inputs is None or not batch_size(inputs, ()):
            return None, "the model is called with positional and named inputs, or with none"
        with preserved(model, None):
            check_supported(model)
            inputs = detached(inputs)
            plan = audit(model, row_loss, inputs, (), rows=rows, whole=whole, training=True)
            if plan.forward_unchanged or not plan.conclusive:
                return TrainingPlan(plan), ""
            return _with_shared(model, plan, inputs, rows)
    except ModelError as error:  # the engine, used instead, reports what is wrong
        return None, str(error)


def row_loss(output: Any, targets: Any) -> Tensor:
    """Return a loss per example that depends on every element of its output and on nothing else."""
    parts = []
    for tensor in tensors(output):
        if tensor.is_floating_point():
            rows = tensor.reshape(len(tensor), -1).float()
            parts.append(rows @ torch.linspace(0.5, 1.5, rows.shape[1], device=rows.device))
    if not parts:
        raise ModelError(f"got an output without a floating-point tensor ({type(output).__name__}), wanted one")
    return torch.stack(parts).sum(0)


def _with_shared(model: nn.Module, plan: NormPlan, inputs: Any, rows: Tensor | None) -> tuple[TrainingPlan | None, str]:
    """Return the plan with every parameter that no rule serves read off the graph, if autograd agrees."""
    given = torch.arange(len(tensors(inputs)[0])) if rows is None else rows
    inputs = take(inputs, given[torch.arange(plan.size) % len(given)])
    layers = [layer for layer in plan.layers if layer.layout.shared]
    names = [name for name in plan.fallback if plan.reasons[name] != CHOSEN]
    owned = {layer: own for layer, own in layers_with_rules(model).items() if set(own.values()) <= set(names)}
    layers += [CapturedLayer(layer, frozenset(own), {}, BatchLayout.NONE) for layer, own in owned.items()]
    terms = {term.name: term for term in _terms(model, inputs, plan.size, names, layers)}
    for layer, own in owned.items():  # by its own uses, or as the output of its layer
        by_parameter = all(name in terms for name in own.values())
        for name in own.values() if layer in terms and not by_parameter else [layer]:
            terms.pop(name, None)
    by_layer = {name for layer in terms if layer in owned for name in owned[layer].values()}
    wanted = [*plan.fallback, *(layer.name for layer in plan.layers if layer.layout.shared)]
    missing = [name for name in wanted if name not in terms and name not in by_layer]
    if not missing:
        wrong = _wrong(model, inputs, plan.size, tuple(terms.values()))
        for name in wrong:  # the rows of its product may be ordered the other way
            terms[name] = replace(terms[name], positions_first=True)
        missing = _wrong(model, inputs, plan.size, tuple(terms.values())) if wrong else []
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        listed = "; ".join(f"{name}: {plan.reasons[name]}" if name in plan.reasons else name for name in missing[:4])
        return None, f"the backward pass of a training step has no norms of {listed}{more}"
    read = {layer.name for layer in layers}
    kept = [number for number, (layer, _) in enumerate(plan.calls) if layer not in read]
    ruled = replace(
        plan,
        layers=tuple(layer for layer in plan.layers if not layer.layout.shared),
        calls=tuple(plan.calls[number] for number in kept),
        arrived=frozenset(new for new, number in enumerate(kept) if number in plan.arrived),
        fallback=(),
        reasons={},
    )
    return TrainingPlan(ruled, tuple(terms.values())), ""


def _terms(model: nn.Module, inputs: Any, size: int, names: list[str], layers: list[CapturedLayer]) -> list[SharedTerm]:
    """Return where parameters and outputs of layers meet the examples, if all their operations are known ones."""
    blank = tuple(SharedTerm(layer.name, (), layer) for layer in layers if layer.unshared and not layer.shared)
    reader = SharedReader(model, blank, size)
    try:
        with autocast_without_cache():
            losses = row_loss(call(model, inputs), ())
    finally:
        reader.close()
    feeds = feeds_of([losses])
    found = []
    for term in (*(SharedTerm(name, ()) for name in names), *blank):
        leaf = accumulator(model.get_parameter(term.name)) if term.layer is None else reader.leaf(term)
        paths = [path for path, _ in meetings(leaf, feeds, None)] if leaf is not None else []
        products = [path for path in paths if path[-1][0] in ("Addmm", "Mm")]
        if all(combines(path) for path in paths) and not (products and len(paths) > 1):
            found.append(replace(term, paths=tuple(paths)))
    return found


def _wrong(model: nn.Module, inputs: Any, size: int, terms: tuple[SharedTerm, ...]) -> list[str]:
    """Return the terms whose norms are not autograd's, of two examples."""
    owned = layers_with_rules(model)
    names = [[term.name] if term.layer is None else list(owned[term.name].values()) for term in terms]
    reader = SharedReader(model, terms, size)
    try:
        with autocast_without_cache():
            losses = row_loss(call(model, inputs), ())
        reader.recording = False
        examples = losses.detach().nan_to_num(0).topk(2).indices.tolist()
        values = [model.get_parameter(name) for group in names for name in group]
        wanted = {k: iter(parameter_squares(losses[k], values, retain=True).tolist()) for k in examples}
        whole = {k: float(parameter_squares(losses[k], list(model.parameters()), retain=True).sum()) for k in examples}
        reader.recording = True
        reader.find([losses])
        torch.autograd.grad(losses.sum(), values, allow_unused=True)
    finally:
        reader.close()
    squares = reader.by_term()
    wrong = []
    for term, group in zip(terms, names, strict=True):
        right = {k: sum(next(wanted[k]) for _ in group) for k in examples}
        got = squares.get(term.name, torch.zeros(size))
        if (
            term.name in reader.failed
            or got.shape != (size,)
            or not all(agree(float(got[k]), right[k], inputs, model, floor=1e-36 + 1e-6 * whole[k]) for k in examples)
        ):
            wrong.append(term.name)
    return wrong

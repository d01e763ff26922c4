"""Finds what the examples share, and proves that its norms can be read off the graph, on a few examples."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dask_isgd.norms.batch_layouts import BatchLayout
from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.coupling import agree
from dask_isgd.norms.fallback import parameter_squares
from dask_isgd.norms.graph_trace import layers_with_rules
from dask_isgd.norms.model_state import autocast_without_cache
from dask_isgd.norms.tensor_trees import Loss, call, checked_losses
from dask_isgd.norms.training_graph import PRODUCTS, SharedReader, SharedTerm, accumulator, combines, feeds_of, meetings

logger = logging.getLogger("dask_isgd.norms")


def find_shared(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    size: int,
    names: list[str],
    layers: list[CapturedLayer],
) -> tuple[SharedTerm, ...]:
    """Return the terms of the parameters ``names`` and of the outputs of ``layers`` that autograd confirms.

    A parameter is read where it is used, or else as the output of a layer with a rule that all examples share. Nothing
    is read of a model whose graph cannot be followed.
    """
    try:
        return _found(model, loss, inputs, targets, size, names, layers)
    except Exception as error:  # graphs hold operations of any library; the fallback has no such restrictions
        logger.warning("%s: its graph cannot be read (%s: %s)", type(model).__name__, type(error).__name__, error)
        return ()


def _found(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    size: int,
    names: list[str],
    layers: list[CapturedLayer],
) -> tuple[SharedTerm, ...]:
    owned = {layer: own for layer, own in layers_with_rules(model).items() if set(own.values()) <= set(names)}
    outputs = [CapturedLayer(layer, frozenset(own), {}, BatchLayout.NONE) for layer, own in owned.items()]
    found = _candidates(model, loss, inputs, targets, size, names, [*layers, *outputs])
    terms = {term.name: term for term in found}
    spare = {layer: terms.pop(layer) for layer in owned if layer in terms}
    for attempt in range(4):
        if not terms and not spare:
            break
        wrong = _wrong(model, loss, inputs, targets, size, tuple(terms.values())) if terms else []
        if attempt == 0:
            for name in wrong:  # the positions may come first
                terms[name] = replace(terms[name], positions_first=True)
            continue
        for name in wrong:
            del terms[name]
        added = attempt < 3  # what is added now is proved in the next attempt
        for layer in [layer for layer in spare if added and not set(owned[layer].values()) <= terms.keys()]:
            for name in owned[layer].values():
                terms.pop(name, None)
            terms[layer] = spare.pop(layer)
            wrong = [layer]
        if not wrong:
            break
    return tuple(terms.values())


def _candidates(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int, names: list[str], layers: list[CapturedLayer]
) -> list[SharedTerm]:
    """Return where parameters and outputs of layers meet the examples, if all their operations are known ones."""
    owned = layers_with_rules(model)
    blank = tuple(
        SharedTerm(layer.name, (), layer, tuple(owned[layer.name][key] for key in sorted(layer.unshared)))
        for layer in layers
        if layer.unshared and not layer.shared
    )
    reader = SharedReader(model, blank, size)
    try:
        with autocast_without_cache():
            losses = checked_losses(loss, call(model, inputs), targets, size)
    finally:
        reader.close()
    feeds = feeds_of([losses])
    found = []
    for term in (*(SharedTerm(name, ()) for name in names), *blank):
        leaf = accumulator(model.get_parameter(term.name)) if term.layer is None else reader.leaf(term)
        paths = [path for path, _ in meetings(leaf, feeds, None)] if leaf is not None else []
        if all(combines(path) for path in paths) and len({path[-1] in PRODUCTS for path in paths}) <= 1:
            found.append(replace(term, paths=tuple(paths)))
    return found


def _wrong(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int, terms: tuple[SharedTerm, ...]
) -> list[str]:
    """Return the terms whose norms are not autograd's, of two examples."""
    names = [term.names for term in terms]
    reader = SharedReader(model, terms, size)
    try:
        with autocast_without_cache():
            losses = checked_losses(loss, call(model, inputs), targets, size)
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

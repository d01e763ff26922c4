"""The graph of one ordinary forward pass: which layers ran, what the losses depend on, which rows are whose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.capture import gradient_point
from dask_isgd.norms.coupling import coupling_error, mixes_rows
from dask_isgd.norms.model_state import autocast_without_cache, trainable
from dask_isgd.norms.parameter_uses import Graph
from dask_isgd.norms.row_choices import RowChoices
from dask_isgd.norms.rules import rule_of
from dask_isgd.norms.tensor_trees import Loss, call, checked_losses, tensors


def layers_with_rules(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the layers that have a rule, with the parameters it serves: own name -> name in the model."""
    names = {id(parameter): name for name, parameter in trainable(model).items()}
    found = {}
    for layer, module in model.named_modules():
        rule = rule_of(module)
        if rule is None:
            continue
        own = {
            key: names[id(parameter)]
            for key, parameter in module._parameters.items()
            if key in rule.parameters and id(parameter) in names
        }
        if own:
            found[layer] = own
    return found


@dataclass
class GraphTrace:
    """The graph of one ordinary forward pass with gradients of the parameters enabled."""

    losses: Tensor
    calls: Counter[str]
    """Calls of each layer that the losses depend on."""
    graph: Graph
    chosen: dict[int, frozenset[Any]]
    """Parameters, by id, that meet rows chosen by the values of the inputs, and the indices that chose these."""
    mixed: dict[str, str]
    """Layers whose output rows are not the examples, and why."""
    shapes: dict[str, torch.Size]
    """Output shapes of the layers whose output does not have the batch first."""


@dataclass(frozen=True)
class _Output:
    """The output of one call of a layer ("": of the model)."""

    layer: str
    point: Tensor
    shape: torch.Size
    node: Any


def trace_graph(model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int) -> GraphTrace:
    """Run the audit's batch and trace its graph; ModelError if a loss depends on another example's rows."""
    choices = RowChoices(model.parameters(), size)
    with autocast_without_cache():
        output, losses, outputs = _recorded_pass(model, loss, inputs, targets, size, choices)
    graph = Graph(losses)
    if not graph.uses.keys() & {id(parameter) for parameter in model.parameters()}:
        raise ModelError(
            "the loss depends on no trainable parameter: got a graph that is cut, wanted losses computed from the "
            "model's output without detach(), item(), numpy() or no_grad()"
        )
    outputs = [found for found in outputs if found.node in graph.nodes]
    calls = Counter(found.layer for found in outputs)
    outputs = [_Output("", t, t.shape, None) for t in tensors(output) if t.requires_grad] + outputs
    mixed: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    for found in outputs:
        if found.layer and (not found.shape or found.shape[0] != size):
            mixed[found.layer] = f"its output has shape {tuple(found.shape)}, without the batch of {size} first"
            shapes[found.layer] = found.shape
    k = size - 1
    gradients = torch.autograd.grad(losses[k], [found.point for found in outputs], allow_unused=True, retain_graph=True)
    for found, gradient in zip(outputs, gradients, strict=True):
        if gradient is None or found.layer in mixed or not found.shape or found.shape[0] != size:
            continue
        if mixes_rows(gradient.reshape(found.shape), k):
            if not found.layer:
                raise coupling_error("one example's loss has a gradient with respect to another's output")
            mixed[found.layer] = "one example's loss depends on other rows of its output"
    return GraphTrace(losses, calls, graph, _with_unused(model, graph, choices.met), mixed, shapes)


def _with_unused(model: nn.Module, graph: Graph, chosen: dict[int, frozenset[Any]]) -> dict[int, frozenset[Any]]:
    """Return ``chosen``, and parameters of the same kinds that no row of this batch met: experts without a token."""
    kinds = {name: kind_of(model, name) for name in trainable(model)}
    numbers = {name: id(parameter) for name, parameter in trainable(model).items()}
    known = {kind for name, kind in kinds.items() if numbers[name] in chosen}
    unused = [numbers[name] for name, kind in kinds.items() if kind in known and not graph.uses[numbers[name]]]
    return dict.fromkeys(unused, frozenset()) | chosen


def kind_of(model: nn.Module, name: str) -> tuple[type[nn.Module], str, torch.Size]:
    """Return what parameters of several modules of one type have in common."""
    owner, _, key = name.rpartition(".")
    return type(model.get_submodule(owner)), key, model.get_parameter(name).shape


def _recorded_pass(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int, choices: RowChoices
) -> tuple[Any, Tensor, list[_Output]]:
    """Return the model's output, the losses (B,), and the outputs of the layers with a rule, in order."""
    outputs: list[_Output] = []
    recording = True

    def record(layer: str, output: Any) -> None:
        if recording and isinstance(output, Tensor):
            point = gradient_point(output)
            outputs.append(_Output(layer, point, output.shape, point.grad_fn))

    modules = dict(model.named_modules())
    handles = [
        modules[layer].register_forward_hook(lambda m, args, out, layer=layer: record(layer, out), prepend=True)
        for layer in layers_with_rules(model)
    ]
    try:
        with choices.watching(tensors(inputs)):
            output = call(model, inputs)
        recording = False
        return output, checked_losses(loss, output, targets, size), outputs
    finally:
        for handle in handles:
            handle.remove()

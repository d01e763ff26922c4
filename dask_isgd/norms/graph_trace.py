"""What one ordinary forward pass shows: which layers ran, what the losses depend on, whose rows are whose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.capture import gradient_point
from dask_isgd.norms.coupling import coupled, mixes_rows
from dask_isgd.norms.model_state import trainable
from dask_isgd.norms.rules import rule_of
from dask_isgd.norms.tensor_trees import Loss, call, checked_losses, tensors


def candidates(model: nn.Module) -> dict[str, dict[str, str]]:
    """Layers that have a rule: their trainable parameters it serves, own name -> name in the model."""
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
class Seen:
    """What one ordinary forward pass, with gradients of the parameters on, showed."""

    losses: Tensor
    calls: Counter[str]
    """Calls of each layer that the losses depend on."""
    edges: Counter[int]
    """Uses of each parameter in the graph of the losses, by id."""
    mixed: dict[str, str]
    """Layers whose output rows are not the examples, and why."""
    shapes: dict[str, torch.Size]
    """Of the output of those that do not lead with the batch."""


def observe(model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int) -> Seen:
    """Run the audit's batch and look at the graph; ModelError if a loss depends on another example's rows."""
    outputs: list[tuple[str, Tensor, torch.Size, Any]] = []
    recording = True

    def watch(layer: str, module: nn.Module, args: Any, output: Any) -> None:
        if recording and isinstance(output, Tensor):
            point = gradient_point(output)
            outputs.append((layer, point, output.shape, point.grad_fn))

    modules = dict(model.named_modules())
    handles = [
        modules[layer].register_forward_hook(lambda m, a, o, layer=layer: watch(layer, m, a, o), prepend=True)
        for layer in candidates(model)
    ]
    try:
        output = call(model, inputs)
        recording = False
        losses = checked_losses(loss, output, targets, size)
    finally:
        for handle in handles:
            handle.remove()
    edges, nodes = _edges(losses)
    if not edges.keys() & {id(parameter) for parameter in model.parameters()}:
        raise ModelError(
            "the loss depends on no trainable parameter: got a graph that is cut, wanted losses computed from the "
            "model's output without detach(), item(), numpy() or no_grad()"
        )
    watched = [("", t, t.shape) for t in tensors(output) if t.requires_grad]
    watched += [(layer, point, shape) for layer, point, shape, node in outputs if node in nodes]
    calls = Counter(layer for layer, _, _, node in outputs if node in nodes)
    mixed: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    for layer, _, shape in watched:
        if layer and (not shape or shape[0] != size):
            mixed[layer] = f"its output has shape {tuple(shape)}, which does not lead with the batch ({size})"
            shapes[layer] = shape
    k = size - 1
    gradients = torch.autograd.grad(losses[k], [t for _, t, _ in watched], allow_unused=True, retain_graph=True)
    for (layer, _, shape), gradient in zip(watched, gradients, strict=True):
        if gradient is None or layer in mixed or not shape or shape[0] != size:
            continue
        if mixes_rows(gradient.reshape(shape), k):
            if not layer:
                raise coupled("one example's loss has a gradient with respect to another's output")
            mixed[layer] = "one example's loss depends on other rows of its output"
    return Seen(losses, calls, edges, mixed, shapes)


def _edges(losses: Tensor) -> tuple[Counter[int], dict[Any, None]]:
    """Edges into each parameter's AccumulateGrad node, by the parameter's id; and every node."""
    nodes: dict[Any, None] = {}
    edges: Counter[int] = Counter()
    ahead = [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in nodes:
            continue
        nodes[node] = None
        for following, _ in node.next_functions:
            if following is not None and hasattr(following, "variable"):
                edges[id(following.variable)] += 1
            else:
                ahead.append(following)
    return edges, nodes

"""Which parameters the fast rules serve: proved on a few examples of the user's own data.

A rule sees calls of its module and nothing else, so for each parameter it is checked that

- autograd's graph reaches it as often as captured calls explain (no use behind the module's back);
- the module's output leads with the batch, and example k's loss depends on row k only;
- the rule's norms of two examples are autograd's.

A parameter that fails goes to the fallback, with the reason. Examples that depend on each other in the
whole model have no gradient of their own: ModelError.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.capture import Capture, Site, gradient_point
from dask_isgd.norms.examples import Loss, call, checked_losses, take, tensors, with_tensors
from dask_isgd.norms.fallback import parameter_squares, squares_by_loop, squares_by_vmap
from dask_isgd.norms.rules import RULES
from dask_isgd.norms.state import frozen, random_state, set_random_state, trainable

logger = logging.getLogger("dask_isgd.norms")

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative; half precision: 0.1. A wrong rule is off by far more, rounding by far less."""


@dataclass(frozen=True)
class Plan:
    """How the norms of one model are taken."""

    sites: tuple[Site, ...]
    calls: tuple[tuple[str, int], ...]
    """(layer, dimensions of its output) of every call a pass must make, in order."""
    fired: frozenset[int]
    """The calls whose gradient must arrive."""
    fallback: tuple[str, ...]
    """Parameters taken one example at a time."""
    by_vmap: bool
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each parameter of the fallback is there."""
    sure: bool = True
    """False where the audit's losses were not finite: to be repeated on the next batch."""

    def explains(self, capture: Capture, size: int) -> bool:
        """Whether a pass over ``size`` examples went the way the audit proved."""
        return (
            tuple(capture.calls) == self.calls
            and self.fired == set(capture.fired)
            and not capture.changed
            and all(term.shape == (size,) for term in capture.terms.values())
        )


def candidates(model: nn.Module) -> dict[str, dict[str, str]]:
    """Layers that have a rule: their trainable parameters it serves, own name -> name in the model."""
    names = {id(parameter): name for name, parameter in trainable(model).items()}
    found = {}
    for layer, module in model.named_modules():
        rule = RULES.get(type(module))
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


def audit(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Plan:
    """The plan for a model in its present mode; call inside ``preserved``.

    Raises ModelError for a loss of the wrong shape, examples that depend on each other, and a loss
    that no trainable parameter reaches.
    """
    parameters = trainable(model)
    if not parameters:
        raise ModelError("got a model without a trainable parameter, wanted at least one with requires_grad=True")
    size = _odd_size(model, inputs)
    rows = torch.arange(size) % len(tensors(inputs)[0])
    inputs, targets = take(inputs, rows), take(targets, rows)
    before = random_state(model)
    seen = _observe(model, loss, inputs, targets, size)
    deterministic = all(torch.equal(a, b) for a, b in zip(before, random_state(model), strict=True))
    spots = seen.losses.detach().nan_to_num(0).topk(2).indices.tolist()
    truth = {
        k: dict(zip(parameters, parameter_squares(seen.losses[k], list(parameters.values()), retain=True), strict=True))
        for k in spots
    }
    if deterministic:
        _refuse_changed_losses(model, loss, inputs, targets, seen.losses.detach(), spots)
    own = candidates(model)
    reasons = _unexplained(model, own, seen)
    while True:
        sites = _sites(own, reasons, seen.calls)
        set_random_state(model, before)
        capture, wrong = _spot_check(model, loss, inputs, targets, sites, truth, own)
        if not wrong:
            break
        reasons |= wrong
    fallback = tuple(name for name in parameters if name in reasons)
    by_vmap, why = _vmap_fits(model, loss, inputs, targets, fallback, spots) if fallback else (False, "")
    _report(model, reasons, why)
    return Plan(
        sites=sites,
        calls=tuple(capture.calls),
        fired=frozenset(capture.fired),
        fallback=fallback,
        by_vmap=by_vmap,
        reasons=reasons,
        sure=bool(torch.isfinite(seen.losses).all()),
    )


@dataclass
class _Seen:
    """What one ordinary forward pass, with gradients of the parameters on, showed."""

    losses: Tensor
    calls: Counter[str]
    """Calls of each layer that the losses depend on."""
    edges: Counter[int]
    """Uses of each parameter in the graph of the losses, by id."""
    mixed: dict[str, str]
    """Layers whose output rows are not the examples, and why."""


def _observe(model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int) -> _Seen:
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
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors(inputs)]
        output = call(model, with_tensors(inputs, leaves))
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
    watched = [("", t, t.shape) for t in (*tensors(output), *leaves) if t.requires_grad]
    watched += [(layer, point, shape) for layer, point, shape, node in outputs if node in nodes]
    calls = Counter(layer for layer, _, _, node in outputs if node in nodes)
    mixed: dict[str, str] = {}
    for layer, _, shape in watched:
        if layer and (not shape or shape[0] != size):
            mixed[layer] = f"its output has shape {tuple(shape)}, which does not lead with the batch ({size})"
    k = size - 1
    gradients = torch.autograd.grad(losses[k], [t for _, t, _ in watched], allow_unused=True, retain_graph=True)
    for (layer, _, shape), gradient in zip(watched, gradients, strict=True):
        if gradient is None or layer in mixed or not shape or shape[0] != size:
            continue
        others = gradient.reshape(shape)[:k]
        if bool(((others != 0) & ~others.isnan()).any()):
            if not layer:
                raise _coupled("one example's loss has a gradient with respect to another example")
            mixed[layer] = "one example's loss depends on other rows of its output"
    return _Seen(losses, calls, edges, mixed)


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


def _unexplained(model: nn.Module, own: dict[str, dict[str, str]], seen: _Seen) -> dict[str, str]:
    """The parameters no captured calls explain, and why."""
    captured: Counter[str] = Counter()
    home: dict[str, str] = {}
    for layer, names in own.items():
        for name in names.values():
            captured[name] += seen.calls[layer]
            home[name] = layer
    reasons = {}
    for name, parameter in trainable(model).items():
        uses = seen.edges[id(parameter)]
        if name not in home:
            owner = model.get_submodule(name.rpartition(".")[0])
            reasons[name] = f"no rule for {type(owner).__name__}"
        elif uses != captured[name]:
            reasons[name] = f"used {uses} times, {captured[name]} of them through layers with a rule"
    for layer, why in seen.mixed.items():
        reasons |= {name: why for name in own[layer].values() if name not in reasons}
    return reasons


def _sites(own: dict[str, dict[str, str]], reasons: dict[str, str], calls: Counter[str]) -> tuple[Site, ...]:
    uses: Counter[str] = Counter()
    for layer, names in own.items():
        for name in names.values():
            uses[name] += calls[layer]
    sites = []
    for layer, names in own.items():
        fast = {key: name for key, name in names.items() if name not in reasons}
        alone = frozenset(key for key, name in fast.items() if uses[name] <= 1)
        shared = {key: name for key, name in fast.items() if key not in alone}
        if fast:
            sites.append(Site(layer, alone, shared))
    return tuple(sites)


def fast_pass(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, sites: tuple[Site, ...], size: int
) -> tuple[Capture, Tensor]:
    """One forward and backward pass that forms no weight gradient: the terms, and the losses (B,)."""
    capture = Capture(model, sites)
    with frozen(model), capture.watching():
        capture.recording = True
        output = call(model, inputs)
        capture.recording = False
        losses = checked_losses(loss, output, targets, size)
        if losses.requires_grad:
            torch.autograd.grad(losses, capture.anchor, torch.ones_like(losses), allow_unused=True)
        capture.finish()
    return capture, losses.detach()


def _spot_check(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    sites: tuple[Site, ...],
    truth: dict[int, dict[str, Tensor]],
    own: dict[str, dict[str, str]],
) -> tuple[Capture, dict[str, str]]:
    """The fast pass on the audit's batch, and the parameters whose norms are not autograd's, with the reason."""
    size = len(tensors(inputs)[0])
    try:
        capture, _ = fast_pass(model, loss, inputs, targets, sites, size)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if not sites:
            raise
        why = f"the fast pass fails ({type(error).__name__}: {str(error).splitlines()[0]})"
        return Capture(model, ()), {own[s.layer][key]: why for s in sites for key in _fast(s)}
    served: dict[str, list[str]] = {site.layer: [own[site.layer][key] for key in site.alone] for site in sites}
    for site in sites:
        served |= {name: [name] for name in (site.shared or {}).values()}
    wrong = {own[layer][key]: why for layer, why in capture.changed.items() for key in own[layer]}
    for key, names in served.items():
        for k, squares in truth.items():
            wanted = sum(float(squares[name]) for name in names)
            got = float(capture.terms[key][k]) if key in capture.terms else 0.0
            # Norms below 1e-18 leave float32 as they are squared.
            floor = 1e-36 + 1e-6 * sum(float(square) for square in squares.values())
            if not close(got, wanted, inputs, model, floor=floor):
                why = f"its rule gives {got**0.5:.6g} where autograd gives {wanted**0.5:.6g}"
                wrong |= {name: why for name in names if name not in wrong}
    fast = {own[site.layer][key] for site in sites for key in _fast(site)}
    return capture, {name: why for name, why in wrong.items() if name in fast}


def _fast(site: Site) -> list[str]:
    return [*site.alone, *(site.shared or ())]


def close(got: float, wanted: float, inputs: Any, model: nn.Module, *, floor: float = 0.0) -> bool:
    """Whether two numbers agree to what the dtype can tell, squares at that; non-finite agrees with non-finite."""
    dtypes = {t.dtype for t in (*model.parameters(), *tensors(inputs)) if t.is_floating_point()}
    tolerance = max((TOLERANCE.get(dtype, 0.1) for dtype in dtypes), default=1e-3)
    if not (abs(got) < float("inf") and abs(wanted) < float("inf")):
        return not (abs(got) < float("inf")) and not (abs(wanted) < float("inf"))
    return abs(got - wanted) <= 2 * tolerance * abs(wanted) + floor


def _refuse_changed_losses(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, losses: Tensor, spots: list[int]
) -> None:
    """ModelError if two examples have other losses in a batch of their own."""
    rows = torch.tensor(spots)
    with torch.no_grad():
        apart = checked_losses(loss, call(model, take(inputs, rows)), take(targets, rows), len(spots))
    scale = float(losses.abs().nan_to_num(0, 0, 0).max())
    for k, value in zip(spots, apart.tolist(), strict=True):
        if not close(value, float(losses[k]), inputs, model, floor=1e-3 * scale):
            raise _coupled(f"an example's loss is {float(losses[k]):.6g} in one batch and {value:.6g} in another")


def _coupled(found: str) -> ModelError:
    return ModelError(
        f"got a model or a loss that couples the examples of a batch ({found}): no example has a gradient of its own. "
        "Wanted a loss of each example that depends on nothing else in the batch: take out statistics over the "
        "batch (batch normalisation in train mode, contrastive or in-batch terms)"
    )


def _vmap_fits(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, names: tuple[str, ...], spots: list[int]
) -> tuple[bool, str]:
    """Whether vmap runs this model and agrees with a plain loop on two examples; why not, otherwise.

    Compared in eval mode: with dropout on, the two draw differently.
    """
    rows = torch.tensor(spots)
    inputs, targets = take(inputs, rows), take(targets, rows)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        wanted, _ = squares_by_loop(model, loss, inputs, targets, names)
        try:
            got, _ = squares_by_vmap(model, loss, inputs, targets, names)
        except Exception as error:  # whatever vmap says: the loop needs none of it
            return False, f"vmap fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        for module, training in modes.items():
            module.training = training
    for a, b in zip(got.tolist(), wanted.tolist(), strict=True):
        if not close(a, b, inputs, model, floor=1e-36):
            return False, f"vmap gives {a**0.5:.6g} where autograd gives {b**0.5:.6g}"
    return True, ""


def _odd_size(model: nn.Module, inputs: Any) -> int:
    """A few examples, as many as no other dimension has: a layer that leads with something else shows."""
    taken: set[int] = {n for parameter in model.parameters() for n in parameter.shape}
    taken |= {n for tensor in tensors(inputs) for n in tensor.shape[1:]}
    sizes: list[int] = [5, 7, 11, 13, 17, 19, *range(23, 1000, 2)]
    return next(size for size in sizes if size not in taken)


def _report(model: nn.Module, reasons: dict[str, str], why: str) -> None:
    if reasons:
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        how = f"by a loop, as {why}" if why else "by vmap"
        logger.warning("%s: exact norms one example at a time, %s, for %s", type(model).__name__, how, listed)

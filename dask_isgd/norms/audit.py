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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.norms.batch_layouts import Layout, guesses
from dask_isgd.norms.capture import Capture, Site, fast_pass
from dask_isgd.norms.coupling import close, refuse_changed_losses, refuse_mixed_inputs
from dask_isgd.norms.fallback import parameter_squares, squares_by_loop, squares_by_vmap
from dask_isgd.norms.graph_trace import Seen, candidates, observe
from dask_isgd.norms.model_state import random_state, set_random_state, trainable
from dask_isgd.norms.per_example_copies import Shape, copies
from dask_isgd.norms.tensor_trees import Loss, take, tensors

logger = logging.getLogger("dask_isgd.norms")


@dataclass(frozen=True)
class NormPlan:
    """How the norms of one model are taken."""

    sites: tuple[Site, ...]
    copies: Mapping[str, Shape]
    """Parameters given out as one copy an example, and its shape."""
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

    @property
    def leaves_forward_alone(self) -> bool:
        """Whether an ordinary training step holds all the norms, none of its tensors exchanged for another."""
        return not (self.fallback or self.copies or any(site.layout.shared for site in self.sites))


@dataclass(frozen=True)
class _Trial:
    """The audit's batch, and what autograd says about two of its examples."""

    model: nn.Module
    loss: Loss
    inputs: Any
    targets: Any
    size: int
    random: list[Tensor]
    own: dict[str, dict[str, str]]
    """Layers with a rule: their parameters, own name -> name in the model."""
    truth: dict[int, dict[str, Tensor]]
    """Example -> parameter -> squared norm."""

    def wrong(self, sites: tuple[Site, ...], copies: Mapping[str, Shape]) -> tuple[Capture, dict[str, str]]:
        """A fast pass, and the parameters whose norms are not autograd's, with the reason."""
        set_random_state(self.model, self.random)
        served = {name: (site.layer, key) for site in sites for name, key in _served(site, self.own).items()}
        try:
            capture, _ = fast_pass(self.model, self.loss, self.inputs, self.targets, sites, copies, self.size)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if not (sites or copies):
                raise
            why = f"the fast pass fails ({type(error).__name__}: {str(error).splitlines()[0]})"
            return Capture(self.model, (), self.size), dict.fromkeys([*served, *copies], why)
        groups: dict[str, list[str]] = {site.layer: [self.own[site.layer][key] for key in site.alone] for site in sites}
        groups |= {name: [name] for site in sites for name in site.shared.values()}
        groups |= {name: [name] for name in copies}
        wrong = {name: capture.changed[layer] for name, (layer, _) in served.items() if layer in capture.changed}
        for key, names in groups.items():
            for k, squares in self.truth.items():
                wanted = sum(float(squares[name]) for name in names)
                got = float(capture.terms[key][k]) ** 2 if key in capture.terms else 0.0
                # Norms below 1e-18 leave float32 as they are squared.
                floor = 1e-36 + 1e-6 * sum(float(square) for square in squares.values())
                if not close(got, wanted, self.inputs, self.model, floor=floor):
                    why = f"its rule gives {got**0.5:.6g} where autograd gives {wanted**0.5:.6g}"
                    wrong |= {name: why for name in names if name not in wrong}
        return capture, wrong


def audit(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> NormPlan:
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
    seen = observe(model, loss, inputs, targets, size)
    deterministic = all(torch.equal(a, b) for a, b in zip(before, random_state(model), strict=True))
    spots = seen.losses.detach().nan_to_num(0).topk(2).indices.tolist()
    truth = {
        k: dict(zip(parameters, parameter_squares(seen.losses[k], list(parameters.values()), retain=True), strict=True))
        for k in spots
    }
    refuse_mixed_inputs(model, loss, inputs, targets)
    if deterministic:
        refuse_changed_losses(model, loss, inputs, targets, seen.losses.detach(), spots)
    own = candidates(model)
    trial = _Trial(model, loss, inputs, targets, size, before, own, truth)
    layouts = _layouts(trial, seen)
    reasons = _unexplained(model, own, seen, layouts)
    shapes = _copies(trial, [name for name in reasons if not any(name in names.values() for names in own.values())])
    reasons = {name: why for name, why in reasons.items() if name not in shapes}
    while True:
        if reasons and not deterministic:
            why = "dropout is on, and one pass must serve all parameters"
            reasons |= {name: why for name in parameters if name not in reasons}
        sites = _sites(own, reasons, seen.calls, layouts)
        shapes = {name: shape for name, shape in shapes.items() if name not in reasons}
        capture, wrong = trial.wrong(sites, shapes)
        if not wrong:
            break
        reasons |= wrong
    fallback = tuple(name for name in parameters if name in reasons)
    by_vmap, why = _vmap_fits(model, loss, inputs, targets, fallback, spots) if fallback else (False, "")
    _report(model, reasons, why)
    return NormPlan(
        sites=sites,
        copies=shapes,
        calls=tuple(capture.calls),
        fired=frozenset(capture.fired),
        fallback=fallback,
        by_vmap=by_vmap,
        reasons=reasons,
        sure=bool(torch.isfinite(seen.losses).all()),
    )


def _layouts(trial: _Trial, seen: Seen) -> dict[str, Layout]:
    """Where the batch is in layers that do not lead with it, as far as autograd agrees."""
    found = {}
    for layer, shape in seen.shapes.items():
        for layout in guesses(shape, trial.size):
            keys = frozenset(trial.own[layer])
            site = Site(layer, keys if seen.calls[layer] == 1 else frozenset(), {}, layout)
            if site.alone and not trial.wrong((site,), {})[1]:
                found[layer] = layout
                break
    return found


def _copies(trial: _Trial, names: list[str]) -> dict[str, Shape]:
    """The parameters that can be given out as one copy an example, and its shape."""
    found: dict[str, Shape] = {}
    known: dict[tuple[type[nn.Module], str, Shape], list[Shape]] = {}
    for name in names:
        parent, _, key = name.rpartition(".")
        shape = tuple(trial.model.get_parameter(name).shape)
        kind = (type(trial.model.get_submodule(parent)), key, shape)
        if kind not in known:  # the many of one kind are tried once, and proved together
            known[kind] = [copy for copy in copies(shape) if not trial.wrong((), {name: copy})[1]][:1]
        found |= dict.fromkeys([name], *known[kind]) if known[kind] else {}
    return found


def _unexplained(
    model: nn.Module, own: dict[str, dict[str, str]], seen: Seen, layouts: Mapping[str, Layout]
) -> dict[str, str]:
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
        if layer not in layouts:
            reasons |= {name: why for name in own[layer].values() if name not in reasons}
    return reasons


def _sites(
    own: dict[str, dict[str, str]], reasons: dict[str, str], calls: Counter[str], layouts: Mapping[str, Layout]
) -> tuple[Site, ...]:
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
            sites.append(Site(layer, alone, shared, layouts.get(layer, Layout.FIRST)))
    return tuple(sites)


def _served(site: Site, own: dict[str, dict[str, str]]) -> dict[str, str]:
    """The parameters a site serves, name in the model -> own name."""
    return {own[site.layer][key]: key for key in (*site.alone, *site.shared)}


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

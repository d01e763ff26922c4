"""Per-example norms by other libraries, each as one function of a batch: Opacus, BackPACK, torch.func.

If a library is not installed, does not support a layer or returns other numbers, it is omitted, with the reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

ELEMENTS = 1 << 28
"""Elements of per-example gradients at a time (1 GB), for the libraries that form them."""

Norms = Callable[[Tensor, Tensor], Tensor]


def torch_func(model: nn.Module) -> Norms:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    chunk = max(1, ELEMENTS // sum(p.numel() for p in parameters.values()))

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    def square(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        gradients = grad(one)(parameters, x, y)
        return torch.stack([g.square().sum() for g in gradients.values()]).sum()

    def norms(x: Tensor, y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # vmap runs the fused kernel one example at a time
            return vmap(square, in_dims=(None, 0, 0), chunk_size=min(chunk, len(x)))(parameters, x, y).sqrt()

    return norms


def opacus_hooks(model: nn.Module) -> Norms:
    from opacus import GradSampleModule

    watched = GradSampleModule(model, loss_reduction="sum")
    chunk = max(1, ELEMENTS // sum(p.numel() for p in model.parameters()))

    def norms(x: Tensor, y: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            functional.cross_entropy(watched(x[rows]), y[rows], reduction="sum").backward()
            each = [p.grad_sample.flatten(1).norm(dim=1) for p in watched.parameters()]
            parts.append(torch.stack(each, 1).norm(dim=1))
            for p in watched.parameters():
                p.grad_sample = None
        return torch.cat(parts)

    return norms


def opacus_ghost(model: nn.Module) -> Norms:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    watched = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", use_ghost_clipping=True)

    def norms(x: Tensor, y: Tensor) -> Tensor:
        functional.cross_entropy(watched(x), y, reduction="sum").backward()
        found = watched.get_norm_sample()
        for p in watched.parameters():
            p._norm_sample = None
        return found

    return norms


def backpack(model: nn.Module) -> Norms:
    from backpack import backpack as extending
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    watched, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def norms(x: Tensor, y: Tensor) -> Tensor:
        with extending(BatchL2Grad()):
            loss(watched(x), y).backward()
        return torch.stack([p.batch_l2 for p in watched.parameters()]).sum(0).sqrt()

    return norms


PEERS: dict[str, Callable[[nn.Module], Norms]] = {
    "torch.func": torch_func,
    "Opacus ghost": opacus_ghost,
    "Opacus hooks": opacus_hooks,
    "BackPACK": backpack,
}


def usable(model: nn.Module, x: Tensor, y: Tensor, wanted: Tensor) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Return the libraries whose norms are ``wanted`` for this model and batch, and why others are omitted."""
    found: dict[str, Callable[[], Any]] = {}
    left_out = []
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                norms = make(copy.deepcopy(model))
                got = norms(x, y).detach()
        except Exception as error:
            left_out.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:110] if str(error) else ''}")
            continue
        error_size = float(((got - wanted).abs() / wanted).max())
        if error_size > 1e-3:
            left_out.append(f"{name}: silently wrong by up to {100 * error_size:.1f} %")
            continue
        found[name] = lambda norms=norms: norms(x, y)
    return found, left_out

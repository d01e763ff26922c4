"""Exact gradients one example at a time, for parameters that no rule serves: vmap in chunks, or a loop.

Each gradient is that of the example in a batch of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from dask_isgd.norms.coupling import agree
from dask_isgd.norms.model_state import frozen, replaced
from dask_isgd.norms.tensor_trees import (
    Loss,
    call,
    checked_losses,
    first_line,
    square_norms,
    take,
    tensors,
    wide,
    with_tensors,
)

WORKSPACE = 1 << 26
"""Elements of per-example gradients at a time (256 MB in float32)."""


def squares_by_vmap(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, names: Iterable[str]
) -> tuple[Tensor, Tensor]:
    """Return Σ ||∂L_n/∂θ||² over the parameters ``names``, (B,) float64, and the losses, (B,).

    Fails for models that vmap cannot run (control flow on values, in-place writes to buffers).
    """
    parameters = {name: model.get_parameter(name).detach() for name in names}
    leaves = tensors((inputs, targets))
    size = len(leaves[0])

    def one(parameters: dict[str, Tensor], *example: Tensor) -> tuple[Tensor, Tensor]:
        inputs_1, targets_1 = with_tensors((inputs, targets), [leaf[None] for leaf in example])

        def loss_of(parameters: dict[str, Tensor]) -> Tensor:
            with replaced(model, parameters):
                return checked_losses(loss, call(model, inputs_1), targets_1, 1)[0]

        gradients, value = grad_and_value(loss_of)(parameters)
        squares = [square_norms(gradient[None])[0] for gradient in gradients.values()]
        return torch.stack(squares).sum(), value.detach()

    elements = sum(parameter.numel() for parameter in parameters.values())
    chunk = min(size, max(1, WORKSPACE // max(1, elements)))
    with frozen(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of operations that it has only slow batching rules for
        squares, losses = vmap(one, in_dims=(None, *([0] * len(leaves))), chunk_size=chunk, randomness="different")(
            parameters, *leaves
        )
    return squares, losses


def squares_by_loop(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, names: Iterable[str]
) -> tuple[Tensor, Tensor]:
    """Return the same as :func:`squares_by_vmap`, by one ordinary backward pass per example: it runs any model."""
    parameters = [model.get_parameter(name) for name in names]
    size = len(tensors(inputs)[0])
    squares, losses = [], []
    for n in range(size):
        rows = slice(n, n + 1)
        targets_1 = take(targets, rows)
        value = checked_losses(loss, call(model, take(inputs, rows)), targets_1, 1)
        squares.append(parameter_squares(value[0], parameters).sum())
        losses.append(value.detach())
    return torch.stack(squares), torch.cat(losses)


def vmap_fits(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, names: tuple[str, ...], *, deterministic: bool
) -> tuple[bool, str]:
    """Return whether vmap runs this model and agrees with a plain loop on these few examples; otherwise, why not.

    With dropout on, the two draw different masks, and are compared in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        if not deterministic:
            model.eval()
        wanted, _ = squares_by_loop(model, loss, inputs, targets, names)
        try:
            got, _ = squares_by_vmap(model, loss, inputs, targets, names)
        except Exception as error:  # vmap may raise anything; the loop has none of its restrictions
            return False, f"vmap fails ({type(error).__name__}: {first_line(error)})"
    finally:
        for module, training in modes.items():
            module.training = training
    for a, b in zip(got.tolist(), wanted.tolist(), strict=True):
        if not agree(a, b, inputs, model, floor=1e-36):
            return False, f"vmap gives {a**0.5:.6g}, autograd gives {b**0.5:.6g}"
    return True, ""


def parameter_squares(value: Tensor, parameters: list[nn.Parameter], *, retain: bool = False) -> Tensor:
    """Return ||∂value/∂θ||² of each parameter, (len(parameters),) float64; 0 if the value does not depend on it."""
    dtype = wide(value)
    if not value.requires_grad:
        return torch.zeros(len(parameters), dtype=dtype, device=value.device)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=retain)
    zero = torch.zeros((), dtype=dtype, device=value.device)
    dense = (g.to_dense() if g is not None and g.is_sparse else g for g in gradients)
    return torch.stack([zero if g is None else square_norms(g[None])[0].to(zero) for g in dense])

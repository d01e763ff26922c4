"""Models of the pipelines, which can be imported by name: ``"dask_isgd.pipelines.models:digits"``.

The functions need no arguments, so that every worker builds the same module from its name alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """A layer that computes (x − mean) / std in float32, for data stored as bytes.

    The constants are neither trained nor checkpointed. ``mean`` and ``std`` broadcast against one example.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std: got a smallest value of {float(self.std.min()):g}, wanted all values above 0")

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.dtype) - self.mean) / self.std


def mlp(sizes: Sequence[int], *, first: nn.Module | None = None) -> nn.Sequential:
    """Return a multi-layer perceptron with ReLU between its layers.

    ``sizes`` are the numbers of features of the input, the hidden layers and the output, at least two. Inputs of
    shape (B, ...) are flattened; the outputs (B, sizes[-1]) are logits. ``first`` is a module that comes before all
    others, for instance a :class:`Normalise`.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes: got {list(sizes)}, wanted two or more positive layer sizes")
    layers: list[nn.Module] = [*([first] if first is not None else []), nn.Flatten()]
    for into, out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class FourierFeatures(nn.Module):
    """Sines and cosines of random projections: with them a perceptron learns fine structure in few dimensions.

    Tancik et al. 2020, arXiv 2006.10739. Inputs (B, ``dimensions``), outputs (B, 2 ``features``). The projections are
    drawn from N(0, ``scale``²) by a seed of their own and not trained; a larger scale resolves finer structure.
    """

    projections: Tensor

    def __init__(self, dimensions: int, features: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        projections = scale * torch.randn(dimensions, features, generator=generator)
        self.register_buffer("projections", projections, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.projections
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def digits() -> nn.Sequential:
    """Return a 64-512-10 perceptron for the 8×8 handwritten digits."""
    return mlp([64, 512, 10])


def fashion_mnist() -> nn.Sequential:
    """Return a 784-512-512-512-10 perceptron for the 28×28 images of Fashion-MNIST."""
    return mlp([784, 512, 512, 512, 10])


def svhn() -> nn.Sequential:
    """Return the perceptron of the paper (arXiv 1511.06481, section 5): 3072-2048-2048-2048-2048-10.

    It has 18.9 M parameters. Weights are drawn from N(0, 0.01²), biases are 0.
    """
    model = mlp([3072, 2048, 2048, 2048, 2048, 10])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return model


def shuttle() -> nn.Sequential:
    """Return a 9-64-64-7 perceptron for the states of Statlog's shuttle."""
    return mlp([9, 64, 64, 7])


def land_mask() -> nn.Sequential:
    """Return a 256-256-256-2 perceptron on random Fourier features of a unit vector."""
    return mlp([256, 256, 256, 2], first=FourierFeatures(3, 128, 8.0))


def relief() -> nn.Sequential:
    """Return a 256-256-256-1 perceptron on random Fourier features of a unit vector."""
    return mlp([256, 256, 256, 1], first=FourierFeatures(3, 128, 8.0))

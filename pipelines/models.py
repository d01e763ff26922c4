"""Models of the pipelines, importable by name: ``"dask_isgd.pipelines.models:digits"``.

Each takes no argument, so that every worker builds the same module from its name alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(x − mean) / std in float32, with constants that are neither trained nor checkpointed.

    For data kept as bytes. ``mean`` and ``std`` broadcast against one example.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std: got a smallest value of {float(self.std.min()):g}, wanted all above 0")

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.dtype) - self.mean) / self.std


def mlp(sizes: Sequence[int], *, first: nn.Module | None = None) -> nn.Sequential:
    """A multi-layer perceptron with ReLU between its layers.

    ``sizes`` are the features of input, hidden layers and output, two at least. Inputs of shape
    (B, ...) are flattened; the output (B, sizes[-1]) are logits. ``first`` comes before everything,
    a :class:`Normalise` for instance.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes: got {list(sizes)}, wanted two or more positive layer sizes")
    layers: list[nn.Module] = [*([first] if first is not None else []), nn.Flatten()]
    for into, out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def digits() -> nn.Sequential:
    """64-512-10 for the 8×8 digits of scikit-learn."""
    return mlp([64, 512, 10])


def fashion_mnist() -> nn.Sequential:
    """784-512-512-512-10 for the 28×28 images of Fashion-MNIST."""
    return mlp([784, 512, 512, 512, 10])


def svhn() -> nn.Sequential:
    """The paper's 3072-2048-2048-2048-2048-10: weights N(0, 0.01²), biases 0, 18.9 M parameters.

    arXiv 1511.06481, section 5.
    """
    model = mlp([3072, 2048, 2048, 2048, 2048, 10])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return model

"""The models that ``cost.py`` trains and scores, and random data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import norms_models
import numpy as np
from numpy.typing import NDArray
from torch import nn

CLASSES = 10
TOKENS = 1000
LEARNING_RATE, MOMENTUM = 1e-3, 0.9


@dataclass(frozen=True)
class Problem:
    """A model with a minibatch size, and random examples with random labels, which no model fits soon."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Shape of one input; a sequence of tokens has one number, as has a row of features."""
    batch_size: int
    rows: int
    """Examples in the data of a run."""
    scoring_batch: int = 2048
    tokens: bool = False

    def arrays(self, rows: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        """Return inputs (rows, *shape), float32 or int64 tokens, and labels (rows,)."""
        rng = np.random.default_rng(0)
        size = (rows, *self.shape)
        x = rng.integers(0, TOKENS, size) if self.tokens else rng.standard_normal(size, np.float32)
        return x, rng.integers(0, CLASSES, rows)


def small_mlp() -> nn.Module:
    return norms_models.mlp(784, 512, 3)


def large_mlp() -> nn.Module:
    return norms_models.mlp(3072, 2048, 4)


def resnet() -> nn.Module:
    return norms_models.resnet(16, 3)


def transformer() -> nn.Module:
    return norms_models.Transformer(128, 4, tokens=TOKENS)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("mlp-64", "MLP 784-512×3-10, minibatch 64", small_mlp, (784,), 64, 61_440),
        Problem("mlp-128", "MLP 784-512×3-10, minibatch 128", small_mlp, (784,), 128, 61_440),
        Problem("large-mlp", "MLP 3072-2048×4-10, minibatch 128", large_mlp, (3072,), 128, 8_192),
        Problem("resnet", "ResNet-20 with GroupNorm, minibatch 64", resnet, (3, 32, 32), 64, 2_048, 256),
        Problem("transformer", "transformer d=128 L=4 T=128, minibatch 16", transformer, (128,), 16, 1_024, 64, True),
    )
}

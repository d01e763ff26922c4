"""The models for which computing norms is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Workload:
    """A model, and a batch of inputs and targets for it."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def mlp(inputs: int, width: int, layers: int, classes: int = 10) -> nn.Sequential:
    """Return an MLP with ``layers`` hidden layers of ``width`` and ReLU."""
    sizes = [inputs, *[width] * layers]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(8, outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet(width: int, blocks: int) -> nn.Sequential:
    """Return the CIFAR ResNet with 6 ``blocks`` + 2 layers, with GroupNorm in place of BatchNorm."""
    widths = [width, *[width * factor for factor in (1, 2, 4) for _ in range(blocks)]]
    body = [_Block(a, b) for a, b in itertools.pairwise(widths)]
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(size, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A pre-norm encoder that classifies sequences of tokens."""

    def __init__(self, width: int, layers: int, heads: int = 4, tokens: int = 1000) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.layers = nn.Sequential(*[_Layer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.table(tokens))).mean(1))


def workloads(*, tiny: bool) -> dict[str, Workload]:
    """Return the workloads by name; ``tiny`` ones take milliseconds, and their figures mean nothing."""

    def dense(title: str, size: int, inputs: int, width: int, layers: int) -> Workload:
        return Workload(
            f"{title}, B={size}",
            lambda: mlp(inputs, width, layers),
            lambda: (torch.randn(size, inputs), torch.randint(0, 10, (size,))),
        )

    side, size = (8, 3) if tiny else (32, 64)
    length, batch = (6, 3) if tiny else (128, 16)
    return {
        "mlp": dense("MLP 12-16×2-10", 8, 12, 16, 2) if tiny else dense("MLP 3072-2048×4-10", 256, 3072, 2048, 4),
        "small-mlp": dense("MLP 6-8×2-10", 8, 6, 8, 2) if tiny else dense("MLP 784-512×3-10", 128, 784, 512, 3),
        "resnet": Workload(
            f"ResNet-20 with GroupNorm, B={size}",
            lambda: resnet(8, 1) if tiny else resnet(16, 3),
            lambda: (torch.randn(size, 3, side, side), torch.randint(0, 10, (size,))),
        ),
        "transformer": Workload(
            f"Transformer d=128 L=4 T={length}, B={batch}",
            lambda: Transformer(16, 1) if tiny else Transformer(128, 4),
            lambda: (torch.randint(0, 1000, (batch, length)), torch.randint(0, 10, (batch,))),
        ),
    }

"""Normalisation layers and embeddings against autograd, one example at a time in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from norms_oracle import check_rule
from torch import Tensor, nn

from dask_isgd.norms import RULES


def trained(norm: nn.Module, x: Tensor) -> nn.Module:
    """A norm with running statistics and an affine part that are not the initial ones, in eval mode."""
    norm.train()(3 * x + 1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    return norm.eval()


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (6, 4, 5)),
    "GroupNorm, no positions": (lambda: nn.GroupNorm(3, 6), (6,)),
    "GroupNorm, one group": (lambda: nn.GroupNorm(1, 6, eps=1e-2), (6, 7)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 7)),
    "InstanceNorm2d, running": (lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (6, 4, 5)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(6, affine=True), (6, 2, 3, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "BatchNorm1d, positions": (lambda: nn.BatchNorm1d(6), (6, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6, momentum=None), (6, 4, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (6, 2, 3, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (6,)),
    "LayerNorm, positions": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "LayerNorm, two dimensions": (lambda: nn.LayerNorm((5, 6)), (3, 5, 6)),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(6, bias=False, eps=1e-2), (5, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (5, 6)),
    "RMSNorm, two dimensions": (lambda: nn.RMSNorm((5, 6), eps=1e-2), (3, 5, 6)),
}


@pytest.mark.parametrize(
    ("name", "size"),
    # torch's instance normalisation accepts no empty batch
    [(name, size) for name in NORMS for size in (0, 1, 7) if size or not name.startswith("Instance")],
)
def test_normalisation(name: str, size: int) -> None:
    torch.manual_seed(0)
    build, shape = NORMS[name]
    norm = trained(build(), torch.randn(9, *shape))
    check_rule(norm, 2 * torch.randn(size, *shape) + 1)


def test_instance_norm_in_train_mode_leaves_the_running_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(6, affine=True, track_running_stats=True).train()
    x = torch.randn(5, 6, 7)
    check_rule(norm, x)
    before = norm.running_mean.clone()
    RULES[nn.InstanceNorm1d].norms(norm, (x,), torch.randn(5, 6, 7), frozenset({"weight"}))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4)])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None, size: int) -> None:
    torch.manual_seed(0)
    check_rule(nn.Embedding(5, 3, padding_idx=padding_idx), torch.randint(0, 5, (size, *shape)))


def test_sparse_embedding() -> None:
    torch.manual_seed(0)
    check_rule(nn.Embedding(5, 3, sparse=True), torch.randint(0, 5, (7, 6)))

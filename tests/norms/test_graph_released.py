"""What was read off a graph keeps nothing of it: many steps take the memory of one."""

from __future__ import annotations

import gc

import torch
from torch import nn

from dask_isgd.norms.engine import NormEngine
from dask_isgd.norms.graph_reader import GraphReader
from dask_isgd.norms.training_capture import capture_norms


class Scaled(nn.Module):
    """A parameter without a rule, which is read off the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 5), nn.Parameter(torch.rand(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


def loss(output, target):
    return (output - target).square().sum(1)


def alive() -> tuple[int, int]:
    gc.collect()
    found = gc.get_objects()
    return sum(type(each) is GraphReader for each in found), sum(type(each) is torch.Tensor for each in found)


def test_readers_of_scored_batches_are_released():
    engine = NormEngine(Scaled(), loss)
    batches = [(torch.randn(6, 4), torch.randn(6, 5)) for _ in range(6)]
    counts = []
    for x, y in batches:
        engine(x, y)
        counts.append(alive())
    assert engine.plan.shared
    assert counts[-1] == counts[1]
    assert counts[-1][0] == 0


def test_readers_of_training_steps_are_released():
    model, counts = Scaled(), []
    for _ in range(6):
        x, y = torch.randn(6, 4), torch.randn(6, 5)
        with capture_norms(model) as capture:
            loss(model(x), y).mean().backward()
        assert capture.norms(scale=torch.full((6,), 1 / 6)) is not None
        model.zero_grad()
        del capture, x, y
        counts.append(alive())
    assert counts[-1] == counts[1]
    assert counts[-1][0] == 0


def test_a_pass_without_a_backward_pass_is_released():
    model = Scaled()
    for step in range(4):
        with capture_norms(model):
            model(torch.randn(6, 4))
        if step == 1:
            before = alive()
    assert alive() == before

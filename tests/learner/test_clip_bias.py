"""The measured bias of clipping against its exact value."""

from __future__ import annotations

import math

import pytest
import torch

from dask_isgd.learner.clip_bias import COORDINATES, ClipBias
from dask_isgd.learner.clipping import Clipping

GRADIENTS = torch.tensor([[1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [8.0, 1.0, 2.0], [-0.5, 0.2, 0.1]])
PROBABILITIES = torch.tensor([0.4, 0.3, 0.1, 0.2])
BOUND = 2.0


def observe(bias: ClipBias, clipping: Clipping, gradient: torch.Tensor) -> None:
    parts = [gradient[:1].clone(), gradient[1:].clone().reshape(2, 1)]
    clipped = clipping(gradient.norm(), 1.0)
    bias.observe(parts, torch.ones(()) if clipped is None else clipped.divisor)


def test_both_squares_are_estimated_without_bias():
    """300 runs of 12 reports, the mean of their estimates against the exact value; seed fixed, 4 standard errors."""
    clipping = Clipping(BOUND, None)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(300):
        bias = ClipBias([torch.zeros(1), torch.zeros(2, 1)])
        for row in torch.multinomial(PROBABILITIES, 12, replacement=True, generator=generator).tolist():
            observe(bias, clipping, GRADIENTS[row])
        estimates.append(bias.squares().double())
    found = torch.stack(estimates)
    mean = PROBABILITIES @ GRADIENTS
    factors = (BOUND / GRADIENTS.norm(dim=1)).clamp(max=1.0)
    exact = torch.stack([(PROBABILITIES @ (factors[:, None] * GRADIENTS) - mean).norm(), mean.norm()]) ** 2
    errors = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() < 4 * errors).all()
    assert (errors < 0.15 * exact).all(), "the test can fail"


def test_the_value_is_the_relative_norm():
    bias, clipping = ClipBias([torch.zeros(1), torch.zeros(2, 1)]), Clipping(1.0, None)
    for _ in range(3):
        observe(bias, clipping, torch.tensor([0.0, 3.0, 4.0]))
    assert bias.value() == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize("reports", [0, 1])
def test_one_report_tells_no_mean_from_noise(reports):
    bias = ClipBias([torch.zeros(1), torch.zeros(2, 1)])
    for _ in range(reports):
        observe(bias, Clipping(1.0, None), torch.tensor([0.0, 3.0, 4.0]))
    assert math.isnan(bias.value())


def test_a_gradient_that_is_never_clipped_has_no_bias():
    bias = ClipBias([torch.zeros(1), torch.zeros(2, 1)])
    for row in GRADIENTS:
        observe(bias, Clipping(None, None), row)
    assert bias.value() == 0.0


def test_a_part_of_many_coordinates_stands_for_all():
    """A dense gradient of 30 times the coordinates looked at, spread over tensors of very different sizes."""
    sizes = [7, 1, 20 * COORDINATES, 100, 10 * COORDINATES]
    bias, generator = ClipBias([torch.zeros(n) for n in sizes]), torch.Generator().manual_seed(0)
    mean = [torch.randn(n, generator=generator) for n in sizes]
    for k in range(10):
        gradients = [m * (1.0 + (k % 2)) for m in mean]  # every other one is twice as long, and halved
        norm = torch.cat(gradients).norm()
        bias.observe(gradients, Clipping(float(torch.cat(mean).norm()), None)(norm, 1.0).divisor)
    assert sum(tensor.numel() for tensor in bias.state().values()) <= 2 * (COORDINATES + 2)
    assert bias.value() == pytest.approx(1 / 3, rel=0.1)


def test_a_restored_bias_continues_to_the_bit():
    one, two = (ClipBias([torch.zeros(1), torch.zeros(2, 1)]) for _ in range(2))
    for row in GRADIENTS:
        observe(one, Clipping(BOUND, None), row)
    two.restore({name: tensor.clone() for name, tensor in one.state().items()})
    for bias in (one, two):
        observe(bias, Clipping(BOUND, None), GRADIENTS[0])
    assert one.value() == two.value()

"""Clipping: to which bound, what the running mean follows, and that the device is never waited for."""

from __future__ import annotations

import math

import pytest
import torch

from dask_isgd.learner.clipping import DECAY, GROWTH, WARM_UP, Clipped, Clipping


def clip(clipping: Clipping, norm: float, largest: float = 2.4) -> tuple[Clipped | None, float]:
    """Return how a gradient of this norm is clipped, and the norm afterwards."""
    result = clipping(torch.tensor(norm), largest)
    return result, norm if result is None else norm / float(result.divisor)


def warm(mean_factor: float | None = 1.0, norm: float | None = None) -> Clipping:
    """Return a clipping that has seen ``WARM_UP`` norms of 1."""
    made = Clipping(norm, mean_factor)
    for _ in range(WARM_UP):
        clip(made, 1.0)
    return made


@pytest.mark.parametrize(
    ("settings", "largest", "norm", "after"),
    [
        pytest.param({}, 2.4, 1.5, 1.0, id="at most the running mean"),
        pytest.param({"mean_factor": 1.3}, 2.4, 1.5, 1.3, id="at most the factor times the running mean"),
        pytest.param({}, 2.4, 0.5, 0.5, id="a small gradient stays"),
        pytest.param({}, 2.4, 24.0, 1.0, id="a blow-up is held"),
        pytest.param({}, 1.5, 24.0, 24.0 / 1.5**4, id="by no more than the fourth power of the largest coefficient"),
        pytest.param({}, 1.0, 24.0, 24.0, id="uniform draws are not clipped"),
        pytest.param({}, 0.7, 24.0, 24.0, id="nor is a minibatch of coefficients below 1"),
        pytest.param({"norm": 3.0}, 1.0, 24.0, 3.0, id="the absolute bound applies to uniform draws, too"),
        pytest.param({"norm": 0.5}, 2.4, 24.0, 0.5, id="the smaller of both bounds applies: the absolute one"),
        pytest.param({"norm": 3.0}, 2.4, 2.0, 1.0, id="the smaller of both bounds applies: the relative one"),
        pytest.param({"norm": 3.0, "mean_factor": None}, 2.4, 2.0, 2.0, id="no relative bound"),
        pytest.param({"mean_factor": None}, 2.4, 24.0, 24.0, id="no bound"),
        pytest.param({}, 2.4, 0.0, 0.0, id="a gradient of zeros stays"),
    ],
)
def test_the_norm_after_clipping(settings, largest, norm, after):
    result, got = clip(warm(**settings), norm, largest)
    assert got == pytest.approx(after, rel=1e-5)
    if result is None:
        assert settings == {"mean_factor": None}
    else:
        assert bool(result.clipped) == (after < norm)
        assert float(result.divisor) == pytest.approx(norm / after if norm else 1.0, rel=1e-5)


def test_the_running_mean_is_exponential_and_starts_without_bias():
    clipping = Clipping(None, 1e9)
    norms = [1.0 + 0.5 * math.sin(k) for k in range(80)]
    for norm in norms:
        clip(clipping, norm)
    weights = [DECAY ** (len(norms) - 1 - k) for k in range(len(norms))]
    wanted = sum(w * norm for w, norm in zip(weights, norms, strict=True)) / sum(weights)
    assert float(clipping.tensors()["mean"]) == pytest.approx(wanted, rel=1e-5)


def test_an_outlier_hardly_raises_the_bound_and_a_lasting_rise_is_followed():
    clipping = warm()
    clip(clipping, 1e6)
    share = (1 - DECAY) / (1 - DECAY ** (WARM_UP + 1))
    assert float(clipping.tensors()["mean"]) == pytest.approx(1 + share * (GROWTH - 1), rel=1e-5)
    steps = 0
    while float(clipping.tensors()["mean"]) < 9.0:
        clip(clipping, 10.0)
        steps += 1
    assert steps < 200, "tenfold"


NOISE = [math.exp(0.25 * math.sin(1.7 * k * k)) for k in range(4000)]
"""Norms that scatter by about 17 %."""


@pytest.mark.parametrize(
    ("trend", "most", "least"),
    [
        pytest.param(lambda k: 1.0, 0.97, 0.90, id="level: about half of the steps are cut to the mean"),
        pytest.param(lambda k: 100.0 / (100.0 + k), 1.0, 0.995, id="falling with a loss without noise: hardly any is"),
        pytest.param(lambda k: 1.0 + k / 1000.0, 0.97, 0.90, id="rising: the recent mean bounds them"),
    ],
)
def test_the_mean_step_loses_little_of_its_length_where_norms_fall(trend, most, least):
    clipping = Clipping(None, 1.0)
    norms = [trend(k) * noise for k, noise in enumerate(NOISE)]
    after = [clip(clipping, norm)[1] for norm in norms]
    late = range(2000, 4000)
    assert least < sum(after[k] for k in late) / sum(norms[k] for k in late) <= most


def test_a_blow_up_is_held_where_norms_fall():
    clipping = Clipping(None, 1.0)
    for k, noise in enumerate(NOISE[:2000]):
        clip(clipping, noise * 100.0 / (100.0 + k))
    usual = 100.0 / 2100.0
    assert clip(clipping, 10.0 * usual)[1] < 1.5 * usual


def test_norms_of_many_zeros_do_not_end_in_nan():
    clipping = warm()
    for k in range(1000):
        result, after = clip(clipping, float(k % 5 == 0))
        assert result is None or 1.0 <= float(result.divisor) <= 2.4**4 + 1e-3
        assert math.isfinite(after)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 3, WARM_UP + 3])
def test_a_norm_that_is_not_finite_leaves_the_running_mean_finite(bad, after):
    clipping = Clipping(None, 1.0)
    for _ in range(after):
        clip(clipping, 1.0)
    clip(clipping, bad)
    assert 0.0 <= float(clipping.tensors()["mean"]) <= 1.0 + (GROWTH - 1)


def test_a_restored_clipping_continues_to_the_bit():
    one, two = warm(), Clipping(None, 1.0)
    for k in range(7):
        clip(one, 1 + 0.1 * k)
    two.restore({name: tensor.clone() for name, tensor in one.tensors().items()}, one.state())
    for k in range(7):
        a, b = clip(one, 1 + 0.3 * k)[0], clip(two, 1 + 0.3 * k)[0]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_device_is_not_waited_for():
    """Tensors of the meta device have no values: whatever looked at one would raise."""
    clipping = Clipping(2.0, 1.0, device="meta")
    for _ in range(WARM_UP + 2):
        result = clipping(torch.empty((), device="meta"), 2.4)
    assert [tensor.shape for tensor in result] == [()] * 2
    assert result.clipped.dtype == torch.bool
    with pytest.raises(RuntimeError):
        bool(result.clipped)

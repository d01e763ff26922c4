"""Convolutions of every kind against autograd, one example at a time in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norms_oracle import check_rule
from torch import nn

from dask_isgd.norms import RULES
from dask_isgd.norms.rules import convolution
from dask_isgd.norms.rules.convolution import ConvolutionRule

KINDS: dict[bool, list[Any]] = {
    False: [nn.Conv1d, nn.Conv2d, nn.Conv3d],
    True: [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d],
}


@st.composite
def layers(draw: Any, *, transposed: bool) -> tuple[nn.Module, torch.Tensor]:
    space = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(space))

    groups = draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": each(1, 3),
        "stride": each(1, 3),
        "dilation": each(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["padding"] = each(0, 1)
        limits = zip(options["stride"], options["dilation"], strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in limits)
    else:
        options["padding"] = draw(st.sampled_from(["same", "valid", each(0, 2)]))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if options["padding"] == "same":
            options["stride"] = (1,) * space
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(0, 4)), options["in_channels"], *each(5, 7))
    return KINDS[transposed][space - 1](**options), x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers(transposed=False), st.sampled_from([None, True, False]), st.sampled_from([1, 1 << 21]))
def test_convolutions(layer: tuple[nn.Module, torch.Tensor], gram: bool | None, workspace: int) -> None:
    module, x = layer
    rule = ConvolutionRule()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "WORKSPACE", workspace)
        if gram is not None:
            patch.setattr(rule, "_prefers_gram", lambda *_: gram)
        check_rule(module, x, rule)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(transposed=True))
def test_transposed_convolutions(layer: tuple[nn.Module, torch.Tensor]) -> None:
    check_rule(*layer)


@pytest.mark.parametrize(("channels", "side", "gram"), [(16, 32, False), (64, 8, False), (256, 4, True)])
def test_the_form_is_chosen_by_cost(channels: int, side: int, gram: bool) -> None:
    module = nn.Conv2d(channels, channels, 3, padding=1)
    rule = RULES[nn.Conv2d]
    assert isinstance(rule, ConvolutionRule)
    assert rule._prefers_gram(module, torch.empty(2, channels, side, side)) is gram
    torch.manual_seed(0)
    check_rule(module, torch.randn(2, channels, side, side))

"""Convolutions of one, two and three dimensions, and their transposes.

The weight gradients of B examples are those of *one* convolution with B times as many groups: torch's own
kernel computes them nearly as fast as their sum. If the image is small and the weight large, the Gram
form Σ (P_n P_nᵀ) ∘ (D_n D_nᵀ) over the unfolded patches P_n is cheaper.
Shapes: B examples, C channels in, O out, g groups, K elements of the kernel, L positions of the output.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.norms.rules import Saved, register_rule
from dask_isgd.norms.rules.linear import gram_norms
from dask_isgd.norms.tensor_trees import row_norms

WORKSPACE = 1 << 18
"""Elements of weight gradients at a time (1 MB in float32): they stay in the cache until squared."""

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionRule:
    """Inputs (B, C, ...), any stride, padding and its modes, dilation and groups."""

    parameters = frozenset({"weight", "bias"})
    transposed = False

    def save(self, module: _Conv, x: Tensor, unshared: frozenset[str], shared: frozenset[str]) -> Saved:
        return (x,) if "weight" in unshared | shared else ()

    def norms(self, module: _Conv, saved: Saved, grad: Tensor, names: frozenset[str]) -> Tensor:
        bias = row_norms(grad.flatten(2).sum(2)) if "bias" in names else None
        if "weight" not in names:
            assert bias is not None
            return bias
        gram = self._prefers_gram(module, grad)
        step = max(1, WORKSPACE // (self._gram_elements(module, grad) if gram else module.weight.numel()))
        norms = []
        for start in range(0, max(len(grad), 1), step):
            x, d = saved[0][start : start + step].to(grad.dtype), grad[start : start + step]
            norms.append(self._gram(module, x, d) if gram else row_norms(self._weights(module, x, d)))
        weight = norms[0] if len(norms) == 1 else torch.cat(norms)
        return weight if bias is None else torch.hypot(weight, bias)

    def gradient(self, module: _Conv, saved: Saved, grad: Tensor, name: str) -> Tensor:
        if name == "bias":
            return grad.flatten(2).sum(2)
        return self._weights(module, saved[0].to(grad.dtype), grad)

    def _weights(self, module: _Conv, x: Tensor, grad: Tensor) -> Tensor:
        """Return ∂L_n/∂W: (B, *shape of the weight)."""
        size, weight = len(x), module.weight
        x, padding = _padded(module, x)
        if size == 0:
            return grad.new_zeros(0, *weight.shape)
        weights: Tensor = torch.ops.aten.convolution_backward(
            grad.reshape(1, -1, *grad.shape[2:]),
            x.reshape(1, -1, *x.shape[2:]),
            # Only its shape and dtype are used: the gradient does not depend on its values, which are never read.
            grad.new_empty(size * weight.shape[0], *weight.shape[1:]),
            None,
            module.stride,
            padding,
            module.dilation,
            self.transposed,
            _output_padding(module, x, grad) if self.transposed else [0] * len(padding),
            size * module.groups,
            [False, True, False],
        )[1]
        return weights.reshape(size, *weight.shape)

    def _prefers_gram(self, module: _Conv, grad: Tensor) -> bool:
        positions, columns = _shape_of_patches(module, grad)
        outputs = module.out_channels // module.groups
        return positions * (columns + outputs) * 2 < columns * outputs

    def _gram_elements(self, module: _Conv, grad: Tensor) -> int:
        positions, columns = _shape_of_patches(module, grad)
        return module.groups * positions * max(positions, columns)

    def _gram(self, module: _Conv, x: Tensor, grad: Tensor) -> Tensor:
        x, padding = _padded(module, x)
        if any(padding):
            x = functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
        for axis, (kernel, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        space = len(module.kernel_size)
        groups, length = module.groups, prod(grad.shape[2:])
        # (B, C, L..., K...) -> (B g, L, C/g K), and the gradient to (B g, L, O/g)
        patches = x.movedim(1, 1 + space).reshape(len(x), length, groups, -1).transpose(1, 2).flatten(0, 1)
        rows = grad.reshape(len(x) * groups, -1, length).mT
        return row_norms(gram_norms(patches, rows).view(len(x), groups))


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolutionRule(ConvolutionRule):
    """Inputs (B, C, ...), also with ``output_size``."""

    transposed = True

    def _prefers_gram(self, module: _Conv, grad: Tensor) -> bool:
        return False


def _padded(module: _Conv, x: Tensor) -> tuple[Tensor, list[int]]:
    """Return the input, padded if torch's kernel cannot do it, and the zero padding left for the kernel to add."""
    if isinstance(module.padding, str):
        totals = [
            d * (k - 1) if module.padding == "same" else 0
            for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
    else:
        totals = [2 * int(p) for p in module.padding]
    if module.padding_mode == "zeros" and all(total % 2 == 0 for total in totals):
        return x, [total // 2 for total in totals]
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, sides, mode=mode), [0] * len(totals)


def _output_padding(module: _Conv, x: Tensor, grad: Tensor) -> list[int]:
    """Return the output padding that ``output_size`` led to at this call."""
    return [
        out - ((size - 1) * stride - 2 * int(pad) + dilation * (kernel - 1) + 1)
        for out, size, stride, pad, dilation, kernel in zip(
            grad.shape[2:],
            x.shape[2:],
            module.stride,
            module.padding,
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    ]


def _shape_of_patches(module: _Conv, grad: Tensor) -> tuple[int, int]:
    """Return (L, C/g K)."""
    return prod(grad.shape[2:]), module.in_channels // module.groups * prod(module.kernel_size)

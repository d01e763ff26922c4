"""Parameters that no layer's rule serves, replaced with one copy per example.

If a parameter only meets activations element by element, or in products that broadcast (scales, positions, class
tokens, many libraries' normalisation layers), a copy (B, 1…, *shape) in its place computes the same, and its gradient
is that of each example. The audit determines and proves which shape fits, if any does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from dask_isgd.norms.model_state import replaced

Shape = tuple[int, ...]


def copy_shapes(shape: Shape) -> list[Shape]:
    """Return the shapes that one example's copy of a parameter may have, more likely ones first."""
    found: list[Shape] = [shape[1:]] if len(shape) > 1 and shape[0] == 1 else []
    return found + [(1,) * ones + shape for ones in range(4 if len(shape) < 2 else 2)]


@contextmanager
def expanded(model: nn.Module, shapes: Mapping[str, Shape], size: int) -> Iterator[dict[str, Tensor]]:
    """Replace each named parameter with ``size`` copies inside; yield the copies by name, leaves with gradients."""
    leaves = {
        name: model.get_parameter(name).detach().reshape(1, *shape).expand(size, *shape).requires_grad_()
        for name, shape in shapes.items()
    }
    with replaced(model, leaves):
        yield leaves

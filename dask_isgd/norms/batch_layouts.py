"""Where the batch dimension is in a layer's input and output, if it does not come first.

::

    (B, ...)       FIRST    the usual case
    (T, B, ...)    SECOND   positions first
    (B T, ...)     FOLDED   positions folded into the batch

They are different views of the same tensor. What the examples share has no batch: it is read off the graph.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class BatchLayout(Enum):
    FIRST = "batch first"
    SECOND = "batch second"
    FOLDED = "positions folded into the batch"

    def fits(self, shape: tuple[int, ...], size: int) -> bool:
        """Return whether a tensor of this shape can have the batch of ``size`` in this place."""
        match self:
            case BatchLayout.FIRST:
                return len(shape) > 0 and shape[0] == size
            case BatchLayout.SECOND:
                return len(shape) > 1 and shape[1] == size
            case BatchLayout.FOLDED:
                return len(shape) > 0 and shape[0] % max(size, 1) == 0

    def batch_first(self, tensor: Tensor, size: int) -> Tensor:
        """Return the tensor with the batch of ``size`` first."""
        match self:
            case BatchLayout.FIRST:
                return tensor
            case BatchLayout.SECOND:
                return tensor.transpose(0, 1)
            case BatchLayout.FOLDED:
                return tensor.reshape(size, len(tensor) // max(size, 1), *tensor.shape[1:])


def possible_layouts(shape: tuple[int, ...], size: int) -> list[BatchLayout]:
    """Return the layouts that an output of this shape may have; no other dimension equals ``size``."""
    if not shape or shape[0] == size:
        return []
    if len(shape) > 1 and shape[1] == size:
        return [BatchLayout.SECOND]
    if shape[0] % size == 0:
        return [BatchLayout.FOLDED]
    return []

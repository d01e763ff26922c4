"""Where the batch dimension is in a layer's input and output, if it does not come first.

::

    (B, ...)       FIRST    the usual case
    (T, B, ...)    SECOND   positions first
    (B T, ...)     FOLDED   positions folded into the batch
    (1, T, ...)    ONE      shared by all examples, for example an embedding of positions
    (T, ...)       NONE     the same without the leading dimension

The first three are different views of the same tensor. What the examples share is computed once for all of them, so its
gradient is a sum over the batch; it is passed on as one copy per example, and each copy has its own gradient.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class BatchLayout(Enum):
    FIRST = "batch first"
    SECOND = "batch second"
    FOLDED = "positions folded into the batch"
    ONE = "one for all"
    NONE = "no batch"

    @property
    def shared(self) -> bool:
        """Whether the examples share the output."""
        return self in (BatchLayout.ONE, BatchLayout.NONE)

    def fits(self, shape: tuple[int, ...], size: int) -> bool:
        """Return whether a tensor of this shape can have the batch of ``size`` in this place."""
        match self:
            case BatchLayout.FIRST:
                return len(shape) > 0 and shape[0] == size
            case BatchLayout.SECOND:
                return len(shape) > 1 and shape[1] == size
            case BatchLayout.FOLDED:
                return len(shape) > 0 and shape[0] % max(size, 1) == 0
            case BatchLayout.ONE:
                return len(shape) > 0 and shape[0] == 1
            case BatchLayout.NONE:
                return True

    def batch_first(self, tensor: Tensor, size: int) -> Tensor:
        """Return the tensor with the batch of ``size`` first."""
        match self:
            case BatchLayout.FIRST:
                return tensor
            case BatchLayout.SECOND:
                return tensor.transpose(0, 1)
            case BatchLayout.FOLDED:
                return tensor.reshape(size, len(tensor) // max(size, 1), *tensor.shape[1:])
            case BatchLayout.ONE:
                return tensor.expand(size, *tensor.shape[1:])
            case BatchLayout.NONE:
                return tensor.expand(size, *tensor.shape)


def possible_layouts(shape: tuple[int, ...], size: int) -> list[BatchLayout]:
    """Return the layouts that an output of this shape may have; no other dimension equals ``size``."""
    if not shape or shape[0] == size:
        return []
    if shape[0] == 1:
        return [BatchLayout.ONE]
    if len(shape) > 1 and shape[1] == size:
        return [BatchLayout.SECOND]
    if shape[0] % size == 0:
        return [BatchLayout.FOLDED]
    return [BatchLayout.NONE]

"""Where the batch is in a layer's input and output, when it does not come first.

::

    (B, ...)       FIRST    the rule of thumb
    (T, B, ...)    SECOND   positions first
    (B T, ...)     FOLDED   positions folded into the batch
    (1, T, ...)    ONE      shared by all examples, say an embedding of positions
    (T, ...)       NONE     the same without the leading one

The first three are other views of the same tensor. What the examples share is computed once for all of them, so its
gradient is a sum over the batch; it is handed on as one copy an example, and those have a gradient of their own.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class Layout(Enum):
    FIRST = "batch first"
    SECOND = "batch second"
    FOLDED = "positions folded into the batch"
    ONE = "one for all"
    NONE = "no batch"

    @property
    def shared(self) -> bool:
        """Whether the examples share the output."""
        return self in (Layout.ONE, Layout.NONE)

    def first(self, tensor: Tensor, size: int) -> Tensor:
        """The tensor with the batch of ``size`` first."""
        match self:
            case Layout.FIRST:
                return tensor
            case Layout.SECOND:
                return tensor.transpose(0, 1)
            case Layout.FOLDED:
                return tensor.reshape(size, len(tensor) // max(size, 1), *tensor.shape[1:])
            case Layout.ONE:
                return tensor.expand(size, *tensor.shape[1:])
            case Layout.NONE:
                return tensor.expand(size, *tensor.shape)


def guesses(shape: tuple[int, ...], size: int) -> list[Layout]:
    """The layouts that an output of this shape may have; ``size`` is unlike any other dimension."""
    if not shape or shape[0] == size:
        return []
    if shape[0] == 1:
        return [Layout.ONE]
    if len(shape) > 1 and shape[1] == size:
        return [Layout.SECOND]
    if shape[0] % size == 0:
        return [Layout.FOLDED]
    return [Layout.NONE]

"""As many examples at once as the device's memory holds: halved when it does not, and remembered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dask_isgd.errors import ConfigError

_Function = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


class AdaptiveBatch:
    """Calls a function of a batch on parts of it that fit.

    ``most``: examples at once to begin with. ``fixed``: never fewer, for runs that promise the same bits:
    a kernel may sum in another order for another batch. What did not fit is not tried again.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        self.most = most
        self._fixed = fixed

    def __call__(self, function: _Function, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, ...]:
        """What ``function(inputs, targets)`` returns for a whole batch of one or more, along the first dimension.

        Raises ConfigError where a single example, or a ``fixed`` batch, does not fit.
        """
        results: list[tuple[Tensor, ...]] = []
        first = 0
        while first < len(targets):
            part = slice(first, first + self.most)
            try:
                results.append(function(tuple(x[part] for x in inputs), targets[part]))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._halve(min(self.most, len(targets) - first), error)
                continue
            first += self.most
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True)) if len(results) > 1 else results[0]

    def _halve(self, tried: int, error: RuntimeError) -> None:
        if self._fixed or tried == 1:
            why = "a synchronous run keeps its batch size, whatever the memory" if self._fixed else "not even one fits"
            raise ConfigError(
                f"Scoring.batch_size: got {tried} examples at once, for which memory ran out ({error}); {why}. "
                "Lower it, or give the scorers more memory"
            ) from error
        self.most = tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the half may need its memory in one piece


def out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the host's, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)  # the host's allocator and mps say so in words only
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "MPS backend out of memory" in said)

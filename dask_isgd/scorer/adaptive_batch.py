"""As many examples at once as fit into memory: a batch that does not fit is halved, and the size is remembered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dask_isgd.errors import ConfigError

_Function = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


class AdaptiveBatch:
    """Calls a function of a batch on parts of it that fit into memory.

    ``size``: examples per part to begin with; a size that did not fit is not tried again. ``fixed``: never
    use fewer, for runs that promise the same bits: a kernel may sum in another order for another batch.
    """

    def __init__(self, size: int, *, fixed: bool = False) -> None:
        self.size = size
        self._fixed = fixed

    def __call__(self, function: _Function, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, ...]:
        """Return ``function(inputs, targets)`` of a batch of at least one, its parts concatenated.

        Raises ConfigError if a single example, or a ``fixed`` batch, does not fit.
        """
        results: list[tuple[Tensor, ...]] = []
        first = 0
        while first < len(targets):
            part = slice(first, first + self.size)
            try:
                results.append(function(tuple(x[part] for x in inputs), targets[part]))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(min(self.size, len(targets) - first), error)
                continue
            first += self.size
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True)) if len(results) > 1 else results[0]

    def _halve(self, tried: int, error: RuntimeError) -> None:
        if self._fixed or tried == 1:
            reason = "a synchronous run cannot use a smaller batch" if self._fixed else "not even one example fits"
            raise ConfigError(
                f"Scoring.batch_size: got {tried} examples at once, for which memory ran out ({error}); {reason}. "
                "Lower it, or give the scorers more memory"
            ) from error
        self.size = tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the half may need contiguous memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the device or of the host was too small."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error)  # the host's allocator and mps raise plain RuntimeErrors
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in message or "MPS backend out of memory" in message
    )

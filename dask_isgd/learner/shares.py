"""One global minibatch, shared by the processes of ``torch.distributed``, and the scores of all of it.

Every process takes its own share of the rows. Scores of all shares reach all processes through a process group of its
own (gloo, on the host), so that they neither wait for the device nor mix with the sums of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dask_isgd import config
from dask_isgd.errors import ConfigError, WaitTimeoutError
from dask_isgd.sampling.draws import Floats

LOOP_SECONDS = 1800.0
"""For how long processes of a loop wait for each other: as torch's do, since one may evaluate or save alone."""


def share_of(size: int, rank: int, count: int) -> slice:
    """Return the rows of a minibatch of ``size`` that are those of a rank; no two of ``count`` shares differ by more
    than one row.

    >>> [share_of(8, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """
    least, more = divmod(size, count)
    start = rank * least + min(rank, more)
    return slice(start, start + least + (rank < more))


class Travelling(Protocol):
    """Scores of a minibatch that may not have arrived yet."""

    def arrived(self) -> Floats:
        """Return the scores (B,) of the global minibatch, float64, in its order; waits for them if need be."""


class Alone:
    """The only process: the global minibatch is its own."""

    rank, count = 0, 1

    def agree(self, what: object) -> None:
        return None

    def close(self) -> None:
        return None

    def from_first(self, what: Any) -> Any:
        return what

    def gather(self, scores: Tensor, position: tuple[int, int]) -> Travelling:
        return _Local(scores)


class _Local:
    def __init__(self, scores: Tensor) -> None:
        # A copy, as the loop may reuse its tensor; a device is not waited for before the scores are needed.
        self.scores = scores.detach().clone()

    def arrived(self) -> Floats:
        return _on_host(self.scores)


def arrived_all(travelling: Sequence[Travelling]) -> list[Floats]:
    """Return the scores of several minibatches; those of one process are brought to the host all at once."""
    local = [each.scores for each in travelling if isinstance(each, _Local)]
    if len(local) == len(travelling) > 1 and len({scores.device for scores in local}) == 1:
        return list(_on_host(torch.stack(local)))
    return [each.arrived() for each in travelling]


def _on_host(scores: Tensor) -> Floats:
    return scores.to("cpu", torch.float64).numpy()


class Shares:
    """The processes of ``group``, or all; every one of them has to make its own, at the same point of the program."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: float | None = None) -> None:
        self._timeout = config.seconds("cluster.timeout") if timeout is None else timeout
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self._group: Any = dist.new_group(
            ranks, backend="gloo", timeout=timedelta(seconds=self._timeout), use_local_synchronization=True
        )
        self.rank, self.count = dist.get_rank(self._group), dist.get_world_size(self._group)

    def agree(self, what: object) -> None:
        """Raise ConfigError unless all processes pass the same."""
        found: list[object] = [None] * self.count
        dist.all_gather_object(found, what, group=self._group)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ConfigError(
                    f"ImportanceBatchSampler: process 0 has {found[0]} and process {rank} {other}; wanted the same in "
                    "all, as they share each minibatch"
                )

    def from_first(self, what: Any) -> Any:
        """Return what process 0 passes; all of them call it at the same point, and wait for process 0."""
        found = [what]
        try:
            dist.broadcast_object_list(found, src=dist.get_global_rank(self._group, 0), group=self._group)
        except RuntimeError as error:
            raise WaitTimeoutError(
                f"process 0 did not reply within {self._timeout:g} s ({error}); is it alive?"
            ) from error
        return found[0]

    def gather(self, scores: Tensor, position: tuple[int, int]) -> Travelling:
        """Send ``scores`` (B,) to all processes and receive theirs; returns at once.

        ``position``: the minibatch's step, and how many were drawn so far; they have to be those of all processes.
        """
        return _Gathered(self._group, scores, position, self.count, self._timeout)

    def close(self) -> None:
        """Give up the process group that these processes made for this."""
        dist.destroy_process_group(self._group)

    def broadcast(self, numbers: Tensor) -> None:
        """Replace ``numbers``, on the host and of one shape in all processes, by those of the first process.

        Raises RuntimeError if they do not arrive in time.
        """
        dist.broadcast(numbers, group=self._group, group_src=0)


class _Gathered:
    def __init__(self, group: Any, scores: Tensor, position: tuple[int, int], count: int, timeout: float) -> None:
        own = torch.cat([torch.tensor(position, dtype=torch.float64), scores.detach().to("cpu", torch.float64)])
        self._parts = [torch.empty_like(own) for _ in range(count)]
        self._timeout, self._own, self._result = timeout, own, None
        self._work: Any = dist.all_gather(self._parts, own, group=group, async_op=True)

    def arrived(self) -> Floats:
        if self._work is not None:
            try:
                self._work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise WaitTimeoutError(
                    f"update: the scores of the other processes did not arrive within {self._timeout:g} s ({error}); "
                    "did all of them call update for this minibatch, and with scores?"
                ) from error
            self._work = None
            self._check()
        return np.concatenate([part[2:].numpy() for part in self._parts])

    def _check(self) -> None:
        positions = [part[:2].tolist() for part in self._parts]
        for rank, position in enumerate(positions):
            if position != positions[0]:
                raise ConfigError(
                    f"update: process 0 reports minibatch {positions[0][0]:.0f} with {positions[0][1]:.0f} drawn, "
                    f"process {rank} minibatch {position[0]:.0f} with {position[1]:.0f} drawn; wanted the same in "
                    "all: give their DataLoaders the same num_workers and prefetch_factor, and update in the same steps"
                )


def shares_of(group: dist.ProcessGroup | None, *, timeout: float = LOOP_SECONDS) -> Alone | Shares:
    """Return how the processes of ``group``, or all of them, share minibatches: ``Alone`` if there is only this one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
    return Shares(group, timeout=timeout) if several else Alone()

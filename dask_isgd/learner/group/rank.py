"""One rank of a group: it takes the steps of a stretch with its share of each minibatch, and gathers the norms of all.

Gradients are summed in every step by the default process group, or parameters averaged in some. All else, draws and
norms, travels between stretches through a gloo group of its own (``learner/shares.py``), in a fixed order: first the
norms of the stretch to all ranks, then packets from rank 0. So ranks need not agree on what weights were known when a
minibatch was drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.learner.feed import Feed
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.group.packet import Packet, Stretch, decode, length
from dask_isgd.learner.group.shared_draws import SharedDraws
from dask_isgd.learner.shares import Shares, share_of
from dask_isgd.learner.step import LaunchedStep, Step
from dask_isgd.learner.trainer import Trainer

_COLUMNS = 4
"""Numbers of a step beside its norms: whether there are any, loss, norm of the gradient, ||μ||²."""


class GatheredStep(NamedTuple):
    """A step of the whole group."""

    step: int
    result: Step
    """Loss, norms and gradient are those of the global minibatch; ||μ||² is that of this rank's own estimate. Of a step
    that each rank took by itself, loss and ||μ||² are the means over the ranks, and the norm of the gradient the root
    of its mean square."""
    measured: bool


class Gathered(NamedTuple):
    """What the ranks report after a stretch."""

    steps: list[GatheredStep]
    leaving: list[int]
    """The ranks whose workers leave."""


class Rank:
    """Rank ``shares.rank`` of a group that trains on minibatches of ``size`` examples."""

    def __init__(
        self, trainer: Trainer, feed: Feed, draws: SharedDraws, shares: Shares, *, size: int, report_every: int
    ) -> None:
        self.trainer, self.feed, self._draws, self.shares = trainer, feed, draws, shares
        self._size, self._report_every = size, report_every
        self._width = share_of(size, 0, shares.count).stop
        trainer.share(shares.rank)
        self._pending: list[tuple[LaunchedStep, bool]] = []

    def close(self) -> None:
        """Train alone again."""
        self.trainer.leave()

    def synchronise(self) -> None:
        """Give the trainers of all ranks the state of rank 0's. Raises GroupLostError."""
        try:
            tensors = self.trainer.tensors()
            forms = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
            forms, state = self.shares.from_first((forms, self.trainer.state()))
            for name, (shape, dtype) in forms.items():
                sent = tensors[name] if self.shares.rank == 0 else torch.empty(shape, dtype=dtype)
                tensors[name] = sent.detach().cpu().contiguous()
                self.shares.broadcast(tensors[name].reshape(-1).view(torch.uint8))
        except (WaitTimeoutError, RuntimeError) as error:
            raise GroupLostError(f"the parameters of rank 0 did not arrive: {error}") from error
        if self.shares.rank != 0:
            self.trainer.restore({name: tensors[name] for name in forms}, state)
        if self.trainer.averaging is not None:
            self.trainer.averaging.begin()

    def agree(self, value: int) -> list[int]:
        """Return the values of all ranks."""
        return [int(part[0]) for part in self._gather(np.array([float(value)]))]

    # Packets --------------------------------------------------------------------------------

    def send(self, packet: Packet) -> None:
        """Send a packet to all other ranks, and put its minibatches where this rank's feed finds them."""
        self._broadcast(packet.encode(self._size))
        self._put(packet)

    def receive(self) -> Stretch:
        """Return the next stretch; its minibatches are where this rank's feed finds them."""
        while True:
            numbers = torch.zeros(length(self._size), dtype=torch.int64)
            self._broadcast(numbers)
            packet = decode(numbers, self._size)
            self._put(packet)
            if not packet.more:
                return packet.stretch

    def _broadcast(self, numbers: Tensor) -> None:
        try:
            self.shares.broadcast(numbers)
        except RuntimeError as error:
            raise GroupLostError(f"a packet of rank 0 did not arrive: {error}") from error

    def _put(self, packet: Packet) -> None:
        for step, drawn in packet.drawn.items():
            self._draws.put(step, drawn)

    # Steps ----------------------------------------------------------------------------------

    def take(self, step: int, stretch: Stretch) -> None:
        """Launch a step of a stretch. Raises GroupLostError."""
        measure = (step + 1) % self._report_every == 0
        batch = self.feed(step, stretch.until)
        self.trainer.update.rate_factor = stretch.rate
        launched = self.trainer.launch(
            step,
            batch.inputs,
            batch.targets,
            batch.draw.coefficients,
            norms=stretch.wants_norms(step),
            measure=measure,
            indices=batch.draw.indices,
            whole=self._draws.whole(step) if self.trainer.averaging is None else None,
        )
        self._pending.append((launched, measure))
        self._draws.forget(step + 1)

    def check(self) -> None:
        """Wait for the steps that were launched. Raises NonFiniteLossError, on all ranks if on one."""
        for launched, _ in self._pending:
            launched.result()

    def results(self) -> list[GatheredStep]:
        """Wait for the steps of this stretch; norms are this rank's own. Raises NonFiniteLossError, on all ranks."""
        done = [GatheredStep(launched.step, launched.result(), measured) for launched, measured in self._pending]
        self._pending = []
        return done

    def gather(self, done: Sequence[GatheredStep], *, leaving: bool) -> Gathered:
        """Gather the norms of the steps of a stretch; ``leaving``: whether this rank's worker leaves.

        Raises GroupLostError.
        """
        form = (len(done), _COLUMNS + self._width)
        numbers = np.zeros(1 + form[0] * form[1])
        numbers[0] = leaving
        for row, (_, result, _) in zip(numbers[1:].reshape(form), done, strict=True):
            row[:_COLUMNS] = (result.norms is not None, result.loss, result.gradient_norm, result.mean_gradient_sq_norm)
            if result.norms is not None:
                row[_COLUMNS : _COLUMNS + len(result.norms)] = result.norms
        parts = self._gather(numbers, done[0].step if done else 0)
        table = np.stack([part[1:].reshape(form) for part in parts], 1)
        steps = [
            GatheredStep(step, self._of_all(result, rows), measured)
            for (step, result, measured), rows in zip(done, table, strict=True)
        ]
        return Gathered(steps, [rank for rank, part in enumerate(parts) if part[0]])

    def _of_all(self, result: Step, rows: NDArray[np.float64]) -> Step:
        """Return the result of a step of all ranks: this one's own, with what their rows (ranks, ...) say."""
        sizes = [share.stop - share.start for share in (share_of(self._size, r, len(rows)) for r in range(len(rows)))]
        norms = None
        if rows[:, 0].all():
            norms = np.concatenate([row[_COLUMNS : _COLUMNS + size] for row, size in zip(rows, sizes, strict=True)])
        if self.trainer.averaging is None:
            return dataclasses.replace(result, norms=norms)
        pairs = np.array([size * (size - 1.0) for size in sizes])  # of draws, from which a rank estimates ||μ||²
        able = pairs > 0
        return dataclasses.replace(
            result,
            loss=float(np.average(rows[:, 1], weights=sizes)),
            norms=norms,
            gradient_norm=float(np.sqrt(np.mean(rows[:, 2] ** 2))),
            mean_gradient_sq_norm=float(np.average(rows[able, 3], weights=pairs[able])) if able.any() else math.nan,
        )

    def _gather(self, numbers: NDArray[np.float64], step: int = 0) -> list[NDArray[Any]]:
        try:
            found = self.shares.gather(torch.from_numpy(numbers), (step, len(numbers))).arrived()
        except (WaitTimeoutError, RuntimeError) as error:
            raise GroupLostError(f"the norms of another rank did not arrive: {error}") from error
        return list(found.reshape(self.shares.count, -1))

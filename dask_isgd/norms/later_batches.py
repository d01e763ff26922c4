"""Which of the later batches are checked: the audit proves a plan on one batch, and trust must be renewed.

A batch is checked if its forward pass created another number of graph nodes than every pass before (another control
flow), if it is the second one, and every so many batches, so that checks take half a per cent of the time.
"""

from __future__ import annotations

from math import ceil

import torch

SHARE = 0.005
"""The share of the time that regular checks take."""
PERIODS = (10, 1000)
"""The smallest and the largest number of batches between regular checks."""


def nodes_created() -> int:
    """Return the number of graph nodes that this thread has created: a difference tells control flows apart."""
    point = torch.zeros((), requires_grad=True)
    return int(point.view_as(point).grad_fn._sequence_nr())  # type: ignore[union-attr]


class CheckSchedule:
    """Chooses the batches of one plan to be checked, and remembers which control flows passed."""

    def __init__(self) -> None:
        self.flows: dict[int, bool] = {}
        """Number of graph nodes -> whether the plan serves passes that create as many."""
        self._remaining = 1
        self.period = PERIODS[0]
        """The batches from one regular check to the next."""
        self.generator = torch.Generator().manual_seed(0)

    def due(self, nodes: int | None = None) -> bool:
        """Return whether this batch must be checked, whose pass created ``nodes`` (None: not known)."""
        if nodes is not None and not self.flows:  # the pass right after the audit of the same batch
            self.flows[nodes] = True
            return False
        self._remaining -= 1
        return self._remaining <= 0 or (nodes is not None and nodes not in self.flows)

    def example(self, size: int) -> int:
        """Return the example to check."""
        return int(torch.randint(size, (), generator=self.generator))

    def checked(self, seconds: float, batch_seconds: float) -> None:
        """Set the time of the next regular check, after one that took ``seconds``; a batch takes ``batch_seconds``."""
        wanted = ceil(seconds / (SHARE * max(batch_seconds, 1e-9)))
        self.period = min(max(wanted, PERIODS[0]), PERIODS[1])
        self._remaining = self.period

"""How the learning rate changes from update to update: by a scheduler of the user's, or along a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dask_isgd.config import Learning


class RateSchedule:
    """The schedule of an optimizer, which :meth:`step` advances after each update.

    ``Learning.scheduler`` is a callable, whose scheduler is used, ``"cosine"``, or None: the rate stays as it is. Along
    the cosine, update t of T is made with (1 + cos(π t / T)) / 2 of the optimizer's rate (Loshchilov and Hutter,
    arXiv 1608.03983, without restarts). Both t and T are those of the run: resumed with more steps, the rate rises to
    what the longer cosine has there.
    """

    def __init__(self, optimizer: Optimizer, learning: Learning) -> None:
        self._optimizer, self._steps, self._updates = optimizer, learning.steps, 0
        self._cosine = learning.scheduler == "cosine"
        self._scheduler: LRScheduler | None = None
        if self._cosine:
            self._scheduler = LambdaLR(optimizer, self._share)
        elif callable(learning.scheduler):
            self._scheduler = learning.scheduler(optimizer)

    @property
    def keeps_rate(self) -> bool:
        """Whether a resumed run has the rate that its scheduler was saved with, whatever its settings say."""
        return self._scheduler is not None and not self._cosine

    def step(self) -> None:
        """Set the rate of the next update."""
        self._updates += 1
        if self._scheduler is not None:
            self._scheduler.step()

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON."""
        kept = self._scheduler.state_dict() if self._scheduler is not None and not self._cosine else None
        return {"updates": self._updates, "scheduler": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``; call it once the optimizer's own state is restored.

        A scheduler that was not there when the state was saved begins at its beginning; a cosine does not.
        """
        self._updates = int(state["updates"])
        if self._cosine:
            self._scheduler = LambdaLR(self._optimizer, self._share, last_epoch=self._updates - 1)
        elif self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(dict(state["scheduler"]))

    def _share(self, update: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(update, self._steps) / self._steps))

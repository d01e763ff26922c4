"""Publishes versions: a copy in the learner's loop, everything else in a thread beside it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from distributed import Client, Future
from torch import Tensor, nn

from dask_isgd.core import models
from dask_isgd.errors import LeaseLostError
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.pauses import Pauses
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.runtime import codec
from dask_isgd.runtime.announcer import Announcer
from dask_isgd.runtime.parameters import publish
from dask_isgd.storage.run.leases import Lease

logger = logging.getLogger(__name__)

_SHARE = 0.05
"""The share of the time that publications may take; short ones take 0.02 of it."""
_UNWANTED_SECONDS = 1.0
"""Seconds between two publications of versions that nobody waits for."""


class Publisher:
    """Publishes a model's parameters in a Dask ``variable``, only the latest version if several wait.

    After a publication it is not ready for so long that publications take a fiftieth of the time, if that is half a
    second or less, otherwise a twentieth, at most 10 s: they take cores and the interpreter's lock from the learner.

    The last two versions are held, so that a scorer that is late finds them. ``dtype`` is that of
    published floats (None: their own). ``checkpoint`` returns the name of the latest one.

    A version that cannot be published is replaced by the next one. It is an error if none was published for
    ``timeout`` seconds, if ``strict`` always, and if ``lossy`` never. ``holder`` returns the address of the worker that
    holds the next version, if this is none.
    """

    def __init__(
        self,
        client: Client,
        variable: str,
        announcer: Announcer,
        lease: Lease,
        *,
        dtype: str | None,
        timeout: float,
        checkpoint: Callable[[], str | None] = lambda: None,
        strict: bool = False,
        lossy: bool = False,
        holder: Callable[[], str] | None = None,
    ) -> None:
        self._client, self._variable, self._announcer = client, variable, announcer
        self._lease, self._checkpoint, self._holder = lease, checkpoint, holder
        self._dtype, self._strict, self._lossy, self._timeout = dtype, strict, lossy, timeout
        self._background, self._snapshots = LatestJobWorker("publication", timeout), Snapshots(codec.pack)
        self._held: deque[Future[Any]] = deque(maxlen=2)
        self._last_published, self._last_offered = time.monotonic(), -math.inf
        self._failing = False
        """Whether the latest version was not published."""
        self._pauses = Pauses(_SHARE, sparing=True)

    def open(self) -> Self:
        """Start the thread."""
        self._background.open()
        return self

    def is_ready(self, *, wanted: bool = True) -> bool:
        """Return whether a version may be offered: none is being published, and the pause after the last one is over.

        ``wanted``: whether it is scored or evaluated; if not, once a second is enough for whoever looks at the run.
        """
        free = self._pauses.over and not self._background.busy
        return free and (wanted or time.monotonic() - self._last_offered >= _UNWANTED_SECONDS)

    def offer(self, model: nn.Module, version: int, *, final: bool = False) -> None:
        """Publish the current parameters soon. Raises the error of an earlier publication."""
        tensors = self._snapshots.take(models.state_of(model), self._dtype)
        self._last_offered = time.monotonic()

        def job() -> None:
            try:
                self._publish(tensors, version, final=final)
            except LeaseLostError:
                raise
            except Exception as error:
                self._tolerate(version, error, final=final)

        self._background.offer(job)

    def _publish(self, tensors: dict[str, Tensor], version: int, *, final: bool) -> None:
        self._lease.check()
        holder = None if self._holder is None else self._holder()
        with self._pauses.timed():
            parameters = publish(
                self._client,
                self._variable,
                tensors,
                run=self._announcer.run,
                incarnation=self._lease.incarnation,
                version=version,
                timeout=self._timeout,
                worker=holder,
            )
        self._lease.check()  # a process that hung meanwhile announces nothing after its successor
        self._last_published, self._failing = time.monotonic(), False
        self._held.append(parameters.future)
        self._announcer.published(version, checkpoint=self._checkpoint(), final=final, holder=holder)

    def _tolerate(self, version: int, error: Exception, *, final: bool) -> None:
        """Let the next version replace one that was not published, unless this very version is waited for."""
        late = time.monotonic() - self._last_published > self._timeout
        if not self._lossy and (final or self._strict or late or not isinstance(error, (OSError, TimeoutError))):
            raise error
        if self._lossy and not self._failing:  # others raise an error instead
            logger.warning("version %d was not published, and scores get older until one is: %r", version, error)
        self._failing = True
        self._announcer.fault("publication", f"version {version}: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Wait until every offered version is published or replaced."""
        self._background.finish()

    def close(self) -> None:
        """Release the versions that are held; one that waits is dropped."""
        self._held.clear()
        self._background.close()

"""Versions on their way out: a copy on the learner's loop, all the rest in a thread beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from distributed import Client, Future
from torch import nn

from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.events import Event, Fault, Published
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.checkpointing import Checkpointer
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.runtime import codec
from dask_isgd.runtime.parameters import publish


class Publisher:
    """Publishes a model's parameters, the newest version only where several wait.

    The last two versions are held, so that a scorer that is late finds them.
    """

    def __init__(
        self,
        spec: RunSpec,
        client: Client,
        recovery: Checkpointer,
        *,
        address: str,
        timeout: float,
        say: Callable[[Event], None],
    ) -> None:
        self._spec, self._client, self._recovery, self._say = spec, client, recovery, say
        self._address, self._timeout = address, timeout
        self._background, self._snapshots = LatestJobWorker("publication", timeout), Snapshots(codec.pack)
        self._held: deque[Future[Any]] = deque(maxlen=2)
        self._last = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a version is still on its way."""
        return self._background.busy

    def offer(self, model: nn.Module, version: int, *, final: bool = False) -> None:
        """Publish the parameters as they are now, soon. Raises what an earlier publication met."""
        tensors = self._snapshots.take(models.state_of(model), self._spec.learning.publish_dtype)

        def job() -> None:
            self._recovery.check()
            try:
                parameters = publish(
                    self._client,
                    self._spec.variable,
                    tensors,
                    run=self._spec.run,
                    incarnation=self._recovery.incarnation,
                    version=version,
                    timeout=self._timeout,
                )
            except (OSError, TimeoutError) as error:
                self._failed(version, error, last=final)
                return
            self._recovery.check()  # a process that hung meanwhile says nothing after its successor
            self._last = time.monotonic()
            self._held.append(parameters.future)
            self._say(
                Published(
                    run=self._spec.run,
                    incarnation=self._recovery.incarnation,
                    version=version,
                    address=self._address,
                    checkpoint=self._recovery.newest,
                    final=final,
                )
            )

        self._background.offer(job)

    def _failed(self, version: int, error: Exception, *, last: bool) -> None:
        """A version that did not go out is made good by the next one, unless somebody waits for this one."""
        if last or self._spec.learning.synchronous or time.monotonic() - self._last > self._timeout:
            raise error
        detail = f"version {version}: {type(error).__name__}: {error}"[:400]
        self._say(Fault(run=self._spec.run, incarnation=self._recovery.incarnation, what="publication", detail=detail))

    def finish(self) -> None:
        """Wait until what was offered is out."""
        self._background.finish()

    def close(self) -> None:
        """Let go of the versions held; what waits is dropped."""
        self._held.clear()
        self._background.close()

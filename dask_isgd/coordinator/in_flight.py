"""Scoring tasks in flight: launched, completed, lost or overdue."""

from __future__ import annotations

import asyncio
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Client, Future

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.order import Order

_FETCH_SECONDS = 30.0
_WAKE_FRACTION = 0.25
_LOST = (CancelledError, asyncio.CancelledError, WaitTimeoutError)


@dataclass(frozen=True)
class CompletedTask:
    """A task that has ended: its result or its error."""

    chunk: int
    order: Order
    result: Any

    @property
    def lost(self) -> bool:
        """Whether its worker or its parameters disappeared, so that the task itself is not at fault."""
        return isinstance(self.result, _LOST)


class InFlightTasks:
    """Tasks that were submitted and have not ended; the caller bounds their number.

    A task without a result after ``timeout`` seconds is cancelled and counts as lost; a result is
    fetched for at most 30 s. ``wake`` is called from Dask's thread once a quarter of the tasks have
    ended: a single scorer receives its next task at once, while hundreds are served in batches
    whenever the caller checks.
    """

    def __init__(self, client: Client, timeout: float, wake: Callable[[], None]) -> None:
        self._client, self._timeout, self._wake = client, timeout, wake
        self._tasks: dict[int, tuple[Future[Any], Order, float]] = {}
        self._ended: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
        self._group: Future[int] | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def chunks(self) -> list[int]:
        return list(self._tasks)

    def keep_group(self, name: str, placement: Mapping[str, Any]) -> None:
        """Keep a task without work in the group ``name`` that the tasks' keys begin with.

        The scheduler forgets a group without tasks. Each new group stays in its record of the
        computation, and that lasts as long as the run's long tasks: of short tasks 160 groups a minute.
        """
        if self._group is None:
            key = (name, "group", 0, 0, uuid.uuid4().hex[:8])
            self._group = self._client.submit(int, key=key, pure=False, **placement)

    def launch(self, chunk: int, future: Future[Any], order: Order) -> None:
        self._tasks[chunk] = (future, order, time.monotonic())
        future.add_done_callback(partial(self._done, chunk))

    def _done(self, chunk: int, future: Future[Any]) -> None:
        self._ended.put((chunk, future))
        if self._ended.qsize() >= _WAKE_FRACTION * len(self._tasks):
            self._wake()

    def completed(self) -> Iterator[CompletedTask]:
        """Yield the tasks that have ended by now, and those that are overdue; they are no longer in flight."""
        ended: dict[int, Future[Any]] = {}
        while not self._ended.empty():
            chunk, future = self._ended.get()
            if chunk in self._tasks and self._tasks[chunk][0] is future:
                ended[chunk] = future
        results = self._results({chunk: future for chunk, future in ended.items() if future.status == "finished"})
        for chunk, future in ended.items():
            result = results[chunk] if chunk in results else _error(future, min(self._timeout, _FETCH_SECONDS))
            yield CompletedTask(chunk, self._tasks.pop(chunk)[1], result)
        for chunk, (future, order, began) in list(self._tasks.items()):
            if time.monotonic() - began > self._timeout:
                del self._tasks[chunk]
                self._client.cancel([future])
                message = f"{future.key}: no result within {self._timeout:g} s (status {future.status})"
                yield CompletedTask(chunk, order, WaitTimeoutError(message))

    def _results(self, finished: dict[int, Future[Any]]) -> dict[int, Any]:
        """Return the results that still exist, by chunk.

        Dask computes a result again if its worker has died since; that is not waited for without end.
        """
        if not finished:
            return {}
        # by position: ``errors="skip"`` drops a lost result from a list, and puts None for it into a dict
        futures = dict(enumerate(finished.values()))
        fetch = partial(self._client.gather, futures, errors="skip", asynchronous=True)
        try:
            found: dict[int, Any] = self._client.sync(fetch, callback_timeout=min(self._timeout, _FETCH_SECONDS))
        except TimeoutError:
            self._client.cancel(list(finished.values()))
            lost = WaitTimeoutError(f"results of {len(finished)} tasks could not be fetched: has their worker died?")
            return dict.fromkeys(finished, lost)
        return {chunk: found[i] for i, chunk in enumerate(finished) if found.get(i) is not None}

    def cancel(self) -> None:
        """Cancel all tasks in flight."""
        if self._tasks and self._client.status == "running":
            self._client.cancel([future for future, _, _ in self._tasks.values()])
        self._tasks.clear()


def _error(future: Future[Any], timeout: float) -> BaseException:
    try:
        error = future.exception(timeout=timeout)
    except (CancelledError, asyncio.CancelledError, TimeoutError) as gone:
        error = gone
    if isinstance(error, BaseException):
        return error
    return CancelledError(f"{future.key}: its result was lost")

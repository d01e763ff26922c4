"""Scoring tasks in flight: launched, landed, lost or overdue."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Client, Future
from distributed.client import FutureCancelledError

from dask_isgd.errors import WaitTimeoutError

_GATHER = 30.0
_WAKE_SHARE = 0.25
_LOST = (FutureCancelledError, CancelledError, asyncio.CancelledError, WaitTimeoutError)


@dataclass(frozen=True)
class CompletedTask:
    """A task that is over: its result or its error."""

    chunk: int
    order: tuple[int, int]
    result: Any

    @property
    def lost(self) -> bool:
        """Nothing was wrong with the task itself: its worker or its parameters went away."""
        return isinstance(self.result, _LOST)


class InFlightTasks:
    """Bounded by its owner; nothing in it is waited for longer than ``timeout`` seconds, results 30.

    ``wake`` is called, from Dask's thread, once a quarter of the tasks is over: a lone scorer gets its
    next task at once, while hundreds are served in batches, whenever the owner looks.
    """

    def __init__(self, client: Client, timeout: float, wake: Callable[[], None]) -> None:
        self._client, self._timeout, self._wake = client, timeout, wake
        self._tasks: dict[int, tuple[Future[Any], tuple[int, int], float]] = {}
        self._over: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def chunks(self) -> list[int]:
        return list(self._tasks)

    def launch(self, chunk: int, future: Future[Any], order: tuple[int, int]) -> None:
        self._tasks[chunk] = (future, order, time.monotonic())
        future.add_done_callback(partial(self._done, chunk))

    def _done(self, chunk: int, future: Future[Any]) -> None:
        self._over.put((chunk, future))
        if self._over.qsize() >= _WAKE_SHARE * len(self._tasks):
            self._wake()

    def landed(self) -> Iterator[CompletedTask]:
        """What is over by now, and what is overdue."""
        over: dict[int, Future[Any]] = {}
        while not self._over.empty():
            chunk, future = self._over.get()
            if chunk in self._tasks and self._tasks[chunk][0] is future:
                over[chunk] = future
        whole = {chunk: future for chunk, future in over.items() if future.status == "finished"}
        results: dict[int, Any] = {}
        if whole:
            gathered = self._gather(list(whole.values()))
            # what was lost meanwhile is left out of a list, but None in a dict
            results = {chunk: gathered[i] for i, chunk in enumerate(whole) if gathered.get(i) is not None}
        for chunk, future in over.items():
            result = results[chunk] if chunk in results else _error(future, min(self._timeout, _GATHER))
            yield CompletedTask(chunk, self._tasks.pop(chunk)[1], result)
        for chunk, (future, order, began) in list(self._tasks.items()):
            if time.monotonic() - began > self._timeout:
                del self._tasks[chunk]
                self._client.cancel([future])
                yield CompletedTask(
                    chunk,
                    order,
                    WaitTimeoutError(f"{future.key}: no result within {self._timeout:g} s (status {future.status})"),
                )

    def _gather(self, futures: list[Future[Any]]) -> dict[int, Any]:
        """Results by position. Those whose worker has died since are computed again: not waited for without end."""
        fetch = partial(self._client.gather, dict(enumerate(futures)), errors="skip", asynchronous=True)
        try:
            found: dict[int, Any] = self._client.sync(fetch, callback_timeout=min(self._timeout, _GATHER))
        except TimeoutError:
            self._client.cancel(futures)
            lost = WaitTimeoutError(f"results of {len(futures)} tasks could not be fetched: has their worker died?")
            return dict.fromkeys(range(len(futures)), lost)
        return found

    def cancel(self) -> None:
        """Give up what is in flight."""
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
    return FutureCancelledError(key=str(future.key), reason="its result was lost")

"""Writes a learner's rows of the history in a thread beside its loop."""

from __future__ import annotations

from collections.abc import Mapping

from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.pauses import Pauses
from dask_isgd.storage import History
from dask_isgd.storage.run.leases import Lease

_SHARE = 0.02
"""The share of the time that writes of the history may take.

A write replaces a chunk: it holds up the learner's interpreter, and a store may charge for each request.
"""


class HistoryWriter:
    """Appends rows to ``history``, and writes them in ``background`` as long as the ``lease`` is held.

    ``background`` may have other jobs, which flush the history themselves.
    """

    def __init__(self, history: History, lease: Lease, background: LatestJobWorker) -> None:
        self._history, self._lease, self._background = history, lease, background
        self._pauses = Pauses(_SHARE)

    def report(self, row: Mapping[str, float], *, write: bool) -> None:
        """Append a row; with ``write``, write the rows that wait soon, unless the background is busy."""
        self._history.append(row)
        if write and self._pauses.over and not self._background.busy:
            self._background.offer(self._write)

    def _write(self) -> None:
        self._lease.check()
        with self._pauses.timed():
            self._history.flush()

    def close(self) -> None:
        """Write the last rows."""
        if self._lease.held():  # else a directory that was deleted would come back, with nothing but these rows
            self._history.flush()

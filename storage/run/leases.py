"""Who holds a run: one lease file per incarnation, the highest is the holder.

Dask may start a second attempt of a task while the first still runs. Both then hold a lease; the
one that is not the highest must stop before it publishes or commits.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dask_isgd.errors import LeaseLostError
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.stores import StorageOptions, open_folder

_LOOK = 0.05


class Leases:
    """The leases of one role in the folder ``url``; files ``{role}-{incarnation:04d}.json``, never removed."""

    def __init__(
        self, url: str | Path | Folder, role: str = "learner", *, storage_options: StorageOptions = None
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", role):
            raise ValueError(f"leases: got role {role!r}, wanted letters, digits and '_'")
        self.folder = url if isinstance(url, Folder) else open_folder(url, storage_options)
        self.role = role
        self._pattern = re.compile(rf"{role}-(\d{{4,}})\.json", re.ASCII)

    def __repr__(self) -> str:
        return f"<Leases {self.folder.url}: {self.role}, highest {self.highest()}>"

    def acquire(self, owner: Mapping[str, Any]) -> int:
        """Take the next incarnation, 1 at first; of many at once each gets its own. Raises StorageFullError.

        ``owner`` (plain JSON: host, process, worker) is kept for people to read.
        """
        body = json.dumps(dict(owner)).encode()
        incarnation = self.highest() + 1
        while not self.folder.create(self._file(incarnation), body):
            incarnation += 1
        return incarnation

    def highest(self) -> int:
        """The youngest incarnation; 0 if there is none."""
        return self._highest(self.folder.names())

    def _highest(self, names: Iterable[str]) -> int:
        matched = (self._pattern.fullmatch(name) for name in names)
        return max((int(match[1]) for match in matched if match), default=0)

    def check(self, incarnation: int) -> None:
        """Raise LeaseLostError if a younger incarnation holds the run."""
        highest = self.highest()
        if highest > incarnation:
            raise LeaseLostError(
                f"{self.role} incarnation {incarnation} is fenced: incarnation {highest} holds the run at "
                f"{self.folder.url.rpartition('/')[0]}. This one stops, publishes and commits nothing more"
            )

    @contextlib.contextmanager
    def leaving(self, incarnation: int) -> Iterator[None]:
        """Meanwhile a successor waits: the holder leaves in order and still has something to commit."""
        self.folder.create(self._file(incarnation, "leaving"), b"")
        try:
            yield
        finally:
            self.folder.create(self._file(incarnation, "left"), b"")

    def await_leaving(self, timeout: float) -> None:
        """Wait until the holder has left, if it says that it is leaving, ``timeout`` seconds at most."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            names = set(self.folder.names())
            holder = self._highest(names)
            if self._file(holder, "leaving") not in names or self._file(holder, "left") in names:
                return
            time.sleep(_LOOK)

    def owner(self, incarnation: int) -> dict[str, Any]:
        """Who took an incarnation; KeyError if nobody did, empty if its taker died while writing."""
        try:
            body = json.loads(self.folder.read(self._file(incarnation)) or b"{}")
        except FileNotFoundError:
            raise KeyError(f"{self.role} incarnation {incarnation} was never taken") from None
        except ValueError:
            return {}
        return dict(body) if isinstance(body, dict) else {}

    def _file(self, incarnation: int, suffix: str = "json") -> str:
        return f"{self.role}-{incarnation:04d}.{suffix}"

"""Leases of a run: one file per incarnation of a role, and the highest incarnation holds the run.

Dask may start a second attempt of a task while the first one still runs. Both then have a lease; the
one that is not the highest must stop before it publishes or commits.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_isgd.errors import LeaseLostError
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.stores import StorageOptions, open_folder

_POLL = 0.05


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

    def acquire(self, owner: Mapping[str, Any]) -> Lease:
        """Acquire the next incarnation, starting from 1; concurrent calls each get their own. Raises StorageFullError.

        ``owner`` (plain JSON: host, process, worker) is kept for people to read.
        """
        body = json.dumps(dict(owner)).encode()
        incarnation = self.highest() + 1
        while not self.folder.create(self.file(incarnation), body):
            incarnation += 1
        return Lease(self, incarnation)

    def lease(self, incarnation: int) -> Lease:
        """Return the lease of an incarnation, which another process may have acquired."""
        return Lease(self, incarnation)

    def highest(self) -> int:
        """Return the highest incarnation, or 0 if there is none."""
        return self._highest(self.folder.names())

    def _highest(self, names: Iterable[str]) -> int:
        matched = (self._pattern.fullmatch(name) for name in names)
        return max((int(match[1]) for match in matched if match), default=0)

    def await_leaving(self, timeout: float) -> None:
        """Wait until the holder has left if it has announced that it is leaving, ``timeout`` seconds at most."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            names = set(self.folder.names())
            holder = self._highest(names)
            if self.file(holder, "leaving") not in names or self.file(holder, "left") in names:
                return
            time.sleep(_POLL)

    def owner(self, incarnation: int) -> dict[str, Any]:
        """Return the owner of an incarnation, empty if it died while writing. Raises KeyError if there is none."""
        try:
            body = json.loads(self.folder.read(self.file(incarnation)) or b"{}")
        except FileNotFoundError:
            raise KeyError(f"{self.role} incarnation {incarnation} was never acquired") from None
        except ValueError:
            return {}
        return dict(body) if isinstance(body, dict) else {}

    def file(self, incarnation: int, suffix: str = "json") -> str:
        """Return the name of an incarnation's file."""
        return f"{self.role}-{incarnation:04d}.{suffix}"


@dataclass(frozen=True)
class Lease:
    """The claim of one incarnation to the run."""

    leases: Leases
    incarnation: int

    @property
    def role(self) -> str:
        return self.leases.role

    def check(self) -> None:
        """Raise LeaseLostError if a younger incarnation holds the run."""
        highest = self.leases.highest()
        if highest > self.incarnation:
            raise LeaseLostError(
                f"{self.role} incarnation {self.incarnation} is fenced: incarnation {highest} holds the run at "
                f"{self.leases.folder.url.rpartition('/')[0]}. This one stops, and publishes and commits nothing more"
            )

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Make a successor wait meanwhile: the holder leaves in order and still has something to commit."""
        folder, file = self.leases.folder, self.leases.file
        folder.create(file(self.incarnation, "leaving"), b"")
        try:
            yield
        finally:
            folder.create(file(self.incarnation, "left"), b"")

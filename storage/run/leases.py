"""Leases of a run: one file per incarnation of a role, and the highest incarnation holds the run.

Dask may start a second attempt of a task while the first one still runs. Both then have a lease; the
one that is not the highest must stop before it publishes or commits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_isgd.errors import LeaseLostError, RunNotFoundError
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.stores import StorageOptions, open_folder

_POLL = 0.05
_SILENCE = 8.0
"""Seconds without a sign of life after which a holder that was leaving counts as dead."""


class Leases:
    """The leases of one role in the folder ``url``; files ``{role}-{incarnation:04d}.json``, never removed."""

    def __init__(
        self, url: str | Path | Folder, role: str = "learner", *, storage_options: StorageOptions = None
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", role):
            raise ValueError(f"leases: got role {role!r}, wanted letters, digits and '_'")
        self.folder = url if isinstance(url, Folder) else open_folder(url, storage_options)
        self.role = role
        self._pattern = re.compile(rf"{role}-(\d{{4,9}})\.json", re.ASCII)

    def __repr__(self) -> str:
        return f"<Leases {self.folder.url}: {self.role}, highest {self.highest()}>"

    def acquire(self, owner: Mapping[str, Any], after: int = 0) -> Lease:
        """Acquire the next incarnation, above ``after``; concurrent calls each get their own. Raises StorageFullError.

        ``owner`` (plain JSON: host, process, worker) is kept for people to read.
        """
        body = json.dumps(dict(owner)).encode()
        incarnation = max(self.highest(), after) + 1
        while not self.folder.create(self.file(incarnation), body):
            incarnation += 1
        return Lease(self, incarnation, acquired=True)

    def lease(self, incarnation: int) -> Lease:
        """Return the lease of an incarnation, which another process may have acquired."""
        return Lease(self, incarnation)

    def highest(self) -> int:
        """Return the highest incarnation, or 0 if there is none."""
        return self._highest(self.folder.names())

    def _highest(self, names: Iterable[str]) -> int:
        matched = (self._pattern.fullmatch(name) for name in names)
        return max((int(match[1]) for match in matched if match), default=0)

    def await_leaving(self, timeout: float, silence: float = _SILENCE) -> None:
        """Wait until the holder has left if it has announced that it is leaving, ``timeout`` seconds at most.

        A holder without a sign of life for ``silence`` seconds was killed while it was leaving.
        """
        deadline = time.monotonic() + timeout
        last, since = b"", time.monotonic()
        while time.monotonic() < min(deadline, since + silence):
            names = set(self.folder.names())
            holder = self._highest(names)
            leaving = self.file(holder, "leaving")
            if leaving not in names or self.file(holder, "left") in names:
                return
            sign = self.folder.read(leaving)
            if sign != last:
                last, since = sign, time.monotonic()
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
    acquired: bool = False
    """Whether this process acquired it, and so must see its file."""

    @property
    def role(self) -> str:
        return self.leases.role

    def check(self) -> None:
        """Raise LeaseLostError if a younger incarnation holds the run, RunNotFoundError if the run has been deleted."""
        names = self.leases.folder.names()
        highest = self.leases._highest(names)
        if highest > self.incarnation:
            raise LeaseLostError(
                f"{self.role} incarnation {self.incarnation} is fenced: incarnation {highest} holds the run at "
                f"{self._run}. This one stops, and publishes and commits nothing more"
            )
        if self.acquired and self.leases.file(self.incarnation) not in names:
            raise RunNotFoundError(
                f"the run directory {self._run} was deleted, moved or replaced during training: the lease of "
                f"{self.role} incarnation {self.incarnation} is gone. The run stops; restore the directory and resume"
            )

    def held(self) -> bool:
        """Return whether `check` passes."""
        try:
            self.check()
        except (LeaseLostError, RunNotFoundError):
            return False
        return True

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise what `check` raises instead of an error that is raised meanwhile: a run that is gone explains it."""
        try:
            yield
        except Exception:
            self.check()
            raise

    @property
    def _run(self) -> str:
        return self.leases.folder.url.rpartition("/")[0]

    @contextlib.contextmanager
    def leaving(self) -> Iterator[Callable[[], None]]:
        """Make a successor wait meanwhile: the holder leaves in order and still has something to commit.

        Yield a function that gives a sign of life, which is due every few seconds.
        """
        folder, file = self.leases.folder, self.leases.file
        signs = itertools.count(1)
        folder.create(file(self.incarnation, "leaving"), b"0")
        try:
            yield lambda: folder.replace(file(self.incarnation, "leaving"), b"%d" % next(signs))
        finally:
            folder.create(file(self.incarnation, "left"), b"")

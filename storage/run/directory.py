"""The run directory: the complete state of a run, and the location of each part of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_isgd.errors import IsgdError, RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.storage.backends.stores import StorageOptions, open_folder
from dask_isgd.storage.run.checkpoints import Checkpoints
from dask_isgd.storage.run.history import History, read_history
from dask_isgd.storage.run.leases import Lease, Leases
from dask_isgd.storage.run.weights import WeightArray

if TYPE_CHECKING:
    import xarray

FORMAT_VERSION = 2
"""2: the settings and the columns of the history have other names than in 1."""
KIND = "dask_isgd run"
WANTS = ("run", "pause", "stop")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_OF_LEARNER = re.compile(r"(?:learner|evaluation)-(\d{4,9})\b", re.ASCII)
_EVALUATION = re.compile(r"evaluation-\d{4,9}-\d{4,9}\b", re.ASCII)
_RUN, _CONTROL = "run.json", "control.json"
_PARTS = ("weights.zarr", "history.zarr", "checkpoints", _CONTROL)


class RunDirectory:
    """The parts and small files of one run, reachable by all workers: a shared path, or ``s3://bucket/folder``.

    ``run.json`` describes the run and is written at its start; ``control.json`` holds the user's
    requests and is replaced. Both are always written atomically. ``storage_options`` are passed to fsspec, travel
    with the run's tasks and are neither stored nor shown. Raises ConfigError for a URL that cannot be a run directory.
    """

    def __init__(self, url: str | Path, *, storage_options: StorageOptions = None) -> None:
        self.folder = open_folder(url, storage_options)
        self._storage_options = dict(storage_options or {})

    def __repr__(self) -> str:
        return f"<RunDirectory {self.url}>"

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def local(self) -> bool:
        """Whether the directory is a path."""
        return self.folder.local

    # The parts ------------------------------------------------------------------------------

    @property
    def weights(self) -> str:
        """Path or URL of the weight array."""
        return self.folder.place("weights.zarr")

    @property
    def history(self) -> str:
        """Path or URL of the history."""
        return self.folder.place("history.zarr")

    def checkpoints(self, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", keep, run=self.name)

    def leases(self, role: str = "learner") -> Leases:
        return Leases(self.folder / "leases", role)

    def acquire_lease(self, role: str, owner: Mapping[str, Any]) -> Lease:
        """Acquire the next incarnation of a role, above all that the run has seen.

        Leases are lost if a run is copied or restored without them; checkpoints, history and stamps tell as well.
        """
        return self.leases(role).acquire(owner, after=self._last_incarnation(role))

    def _last_incarnation(self, role: str) -> int:
        groups = (self.folder / "history.zarr").names()
        if role != "learner":
            return max((int(name.split("-")[2]) for name in groups if _EVALUATION.match(name)), default=0)
        seen = [int(match[1]) for name in groups if (match := _OF_LEARNER.match(name))]
        seen += [incarnation for incarnation, _ in self.checkpoints().orders()]
        try:
            stamps = self.open_weights().read_stamps()[:, 1]
        except IsgdError:
            stamps = np.empty(0)
        return max([*seen, *stamps[np.isfinite(stamps)].astype(int).tolist()], default=0)

    def create_weights(self, n: int, chunk_size: int) -> WeightArray:
        """Create a weight array, as ``WeightArray.create`` does."""
        return WeightArray.create(self.weights, n, chunk_size, storage_options=self._storage_options)

    def open_weights(self) -> WeightArray:
        """Open the weight array. Raises RunNotFoundError if there is none."""
        return WeightArray.open(self.weights, storage_options=self._storage_options)

    def create_history(
        self, group: str, columns: Sequence[str], rows: int, *, attrs: Mapping[str, Any] | None = None
    ) -> History:
        """Create a group of the history, as ``History.create`` does."""
        options = self._storage_options
        return History.create(self.history, group, columns, rows, attrs=attrs, storage_options=options)

    def read_history(self, prefix: str = "learner") -> xarray.Dataset:
        """Return the reports of one kind of writer, as ``read_history`` does."""
        return read_history(self.history, prefix, storage_options=self._storage_options)

    def reported(self) -> float:
        """Return when the history was last written, in seconds since 1970 by its store's clock; NaN if never."""
        return self.folder.last_written("history.zarr/*/step/c/*")

    # The run --------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return whether the directory holds a run."""
        return self.folder.exists(_RUN)

    def require_exclusive(self) -> None:
        """Raise ConfigError if the store cannot keep two learners from holding one run, or cannot be written."""
        self.folder.require_exclusive()

    def create(self, document: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Create a run: write run.json exclusively and atomically. ``document`` is plain JSON.

        ``overwrite`` removes the existing run, and never anything but the parts of a run. Its
        leases stay, so that the new run's learner fences an old one that is still active.
        Raises RunExistsError, StorageFullError.
        """
        there = self.folder.names()
        parts = [part for part in _PARTS if part in there]
        if self.exists():
            if not overwrite:
                raise self.exists_error()
            self._require_run()
            # run.json is removed last, so that an interrupted overwrite can be repeated.
            for part in (*parts, _RUN):
                self.folder.remove(part)
        elif parts:
            raise RunExistsError(
                f"{self.url} holds {', '.join(parts)} but no run.json, so it is unknown what they belong to. "
                "Remove them by hand or choose another run directory"
            )
        text = _encode(document)
        # A retried request may find the file of its first attempt: no two runs have the same document.
        if not self.folder.create(_RUN, text) and (self.local or self.folder.read(_RUN) != text):
            raise self.exists_error()

    def update(self, document: Mapping[str, Any]) -> None:
        """Replace run.json, for a run that is resumed with other settings."""
        self._require_run()
        self.folder.replace(_RUN, _encode(document))

    def remove(self) -> None:
        """Undo `create` of a run that has not started."""
        self._require_run()
        for part in (*_PARTS, _RUN):
            self.folder.remove(part)
        self.folder.remove_empty()

    def document(self) -> dict[str, Any]:
        """Return the document passed to `create`. Raises RunNotFoundError, RunMismatchError for another format."""
        place = self.folder.place(_RUN)
        try:
            document = json.loads(self.folder.read(_RUN))
        except (FileNotFoundError, NotADirectoryError):
            raise RunNotFoundError(f"no run at {self.url}: it holds no run.json. Check the path") from None
        except OSError as error:
            raise RunNotFoundError(f"{place} cannot be read: {error}. Check permissions or credentials") from error
        except ValueError as error:
            raise RunNotFoundError(f"{place} is not JSON: {error}. Restore it from a copy") from error
        if not isinstance(document, dict) or document.pop("kind", None) != KIND:
            raise RunNotFoundError(f"{place} does not describe a run of dask_isgd. Check the path")
        name = document.get("run")
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            # the name becomes part of keys, topics and pages
            raise RunNotFoundError(
                f"{place}: got run name {str(name)[:80]!r}, wanted 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'; "
                "the file was edited by hand"
            )
        if document.get("format_version") != FORMAT_VERSION:
            raise RunMismatchError(
                f"{place}: got format version {document.get('format_version')!r}, this version of dask_isgd reads "
                f"{FORMAT_VERSION}; use the version that wrote the run, or start a new run in another directory"
            )
        return document

    def control(self) -> dict[str, Any]:
        """What the user wants: ``{"want": "run" | "pause" | "stop", ...}``; "run" by default."""
        try:
            return {"want": "run", **json.loads(self.folder.read(_CONTROL))}
        except FileNotFoundError:
            return {"want": "run"}

    def set_control(self, **values: Any) -> None:
        """Change some of the user's requests, plain JSON; readers see either the old or the new requests."""
        if values.get("want", "run") not in WANTS:
            raise ValueError(f"control: got want={values['want']!r}, wanted one of {', '.join(WANTS)}")
        self.document()  # only a run has a control
        self.folder.replace(_CONTROL, json.dumps({**self.control(), **values}).encode())

    def sweep(self, seconds: float | None = None) -> list[str]:
        """Remove and return what killed writers left unfinished in the run more than ``seconds`` ago."""
        found = self.folder.sweep(seconds)
        for part in ("weights.zarr", "history.zarr", "leases"):
            found += (self.folder / part).sweep(seconds, recursive=True)
        return found + self.checkpoints().sweep(seconds)

    def exists_error(self) -> RunExistsError:
        """Return the error for a directory that already holds a run."""
        return RunExistsError(
            f"{self.url} already holds a run. Resume it (resume=True, --resume), delete it and start again "
            "(overwrite=True, --overwrite), or choose another directory"
        )

    def _require_run(self) -> None:
        try:
            self.document()
        except RunMismatchError:  # a run of another version is still a run
            pass
        except RunNotFoundError as error:
            raise RunExistsError(f"{self.url} holds no run that could be overwritten: {error}") from error


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps({**document, "kind": KIND, "format_version": FORMAT_VERSION}, indent=1).encode()

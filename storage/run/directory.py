"""The run directory: the complete state of a run, and the location of each part of it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, IsgdError, RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.storage.backends.stores import StorageOptions, open_folder
from dask_isgd.storage.run.checkpoints import Checkpoints
from dask_isgd.storage.run.documents import WANTS, decode_control, decode_document, encode_document
from dask_isgd.storage.run.history import History, read_columns, read_history
from dask_isgd.storage.run.leases import Lease, Leases
from dask_isgd.storage.run.weights import WeightArray

if TYPE_CHECKING:
    import xarray

logger = logging.getLogger(__name__)

_OF_LEARNER = re.compile(r"(?:learner|evaluation)-(\d{4,9})\b", re.ASCII)
_EVALUATION = re.compile(r"evaluation-\d{4,9}-\d{4,9}\b", re.ASCII)
_RUN, _CONTROL = "run.json", "control.json"
_PARTS = ("weights.zarr", "history.zarr", "checkpoints", _CONTROL)


class RunDirectory:
    """The parts and small files of one run, reachable by all workers: a shared path, or ``s3://bucket/folder``.

    ``run.json`` describes the run and is written at its start; ``control.json`` holds the user's
    requests and is replaced. Both are always written atomically. ``storage_options`` are obstore's, travel
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

    def next_incarnation(self, role: str) -> int:
        """Return the incarnation that `acquire_lease` would acquire."""
        return max(self.leases(role).highest(), self._last_incarnation(role)) + 1

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

    def repair_weights(self, n: int, chunk_size: int) -> None:
        """Create the weight array again if it is absent, damaged or of another size; every chunk is scored again then.

        A client may have died between run.json and the weights. Nothing but time is lost: weights can be computed.
        """
        try:
            found = self.open_weights()
            if (found.n, found.chunk_size) == (n, chunk_size):
                return
            reason = f"{found!r} is not of {n} examples in chunks of {chunk_size}"
        except (RunNotFoundError, DataError) as error:
            reason = str(error)
        logger.warning("run %s: every chunk is scored again (%s)", self.url, reason)
        self.folder.remove("weights.zarr")
        self.create_weights(n, chunk_size)

    def open_weights(self) -> WeightArray:
        """Open the weight array. Raises RunNotFoundError if there is none, DataError if it is damaged."""
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

    def read_columns(self, prefix: str = "learner") -> dict[str, NDArray[Any]]:
        """Return the reports of one kind of writer, as ``read_columns`` does."""
        return read_columns(self.history, prefix, storage_options=self._storage_options)

    def reported(self) -> float:
        """Return when the history was last written, in seconds since 1970 by its store's clock; NaN if never."""
        return self.folder.last_written("history.zarr/*/reports/c/*/*")

    # The run --------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return whether the directory holds a run."""
        return self.folder.exists(_RUN)

    def require_exclusive(self) -> None:
        """Raise ConfigError if the store cannot keep two learners from holding one run, or cannot be written."""
        self.folder.require_exclusive()

    def former(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Return the document of the run to resume; None for a new run.

        Raises RunExistsError unless the run here is resumed or overwritten, RunNotFoundError if there is none to
        resume, RunMismatchError for another format, ConfigError as ``require_exclusive`` does.
        """
        self.require_exclusive()
        if self.exists() and not (resume or overwrite):
            raise self.exists_error()
        return self.document("run", "chunk", "created", "data", "model") if resume else None

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
        text = encode_document(document)
        # A retried request may find the file of its first attempt: no two runs have the same document.
        if not self.folder.create(_RUN, text) and (self.local or self.folder.read(_RUN) != text):
            raise self.exists_error()

    def update(self, document: Mapping[str, Any]) -> None:
        """Replace run.json, for a run that is resumed with other settings."""
        self._require_run()
        self.folder.replace(_RUN, encode_document(document))

    def remove(self) -> None:
        """Undo `create` of a run that has not started."""
        self._require_run()
        for part in (*_PARTS, _RUN):
            self.folder.remove(part)
        self.folder.remove_empty()

    def document(self, *wanted: str) -> dict[str, Any]:
        """Return the document passed to `create`, which must have the ``wanted`` parts: `decode_document`.

        Raises RunNotFoundError, RunMismatchError for another format.
        """
        place = self.folder.place(_RUN)
        try:
            data = self.folder.read(_RUN)
        except (FileNotFoundError, NotADirectoryError):
            raise RunNotFoundError(f"no run at {self.url}: it holds no run.json. Check the path") from None
        except OSError as error:
            raise RunNotFoundError(f"{place} cannot be read: {error}. Check permissions or credentials") from error
        return decode_document(data, place, wanted)

    def control(self) -> dict[str, Any]:
        """What the user wants: ``{"want": "run" | "pause" | "stop", ...}``; "run" by default.

        Raises RunNotFoundError if the file is damaged.
        """
        try:
            data = self.folder.read(_CONTROL)
        except FileNotFoundError:
            return {"want": "run"}
        return decode_control(data, self.folder.place(_CONTROL))

    def attempt(self) -> int:
        """Return the number of the latest start of the run; 0 if there was none, or the control file is damaged."""
        try:
            return int(self.control().get("attempt", 0))
        except RunNotFoundError:
            return 0

    def set_control(self, **values: Any) -> None:
        """Change some of the user's requests, plain JSON; readers see either the old or the new requests."""
        if values.get("want", "run") not in WANTS:
            raise ValueError(f"control: got want={values['want']!r}, wanted one of {', '.join(WANTS)}")
        self.document()  # only a run has a control
        try:
            former = self.control()
        except RunNotFoundError:  # damaged: what is wanted now replaces it
            former = {}
        self.folder.replace(_CONTROL, json.dumps({**former, **values}).encode())

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

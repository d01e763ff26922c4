"""The run directory: the whole truth of a run, and where each part of it lies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dask_isgd.errors import ConfigError, RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.storage import files
from dask_isgd.storage.checkpoints import Checkpoints
from dask_isgd.storage.leases import Leases
from dask_isgd.storage.stores import local_path, redact

FORMAT_VERSION = 1
KIND = "dask_isgd run"
WANTS = ("run", "pause", "stop")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_PARTS = ("weights.zarr", "history.zarr", "checkpoints", "control.json")


class RunDirectory:
    """The paths and small files of one run, on a file system that all workers share.

    ``run.json`` says what the run is and is written once; ``control.json`` says what its user
    wants and is replaced. Both are always whole.
    """

    def __init__(self, url: str | Path) -> None:
        path = local_path(url)
        if path is None:
            raise ConfigError(
                f"run directory: got {redact(url)}, wanted a path on a file system that all workers share; "
                "object stores hold datasets, not runs yet"
            )
        self.path = path

    def __repr__(self) -> str:
        return f"<RunDirectory {self.path}>"

    @property
    def url(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def weights(self) -> str:
        """Where the weight array lies."""
        return str(self.path / "weights.zarr")

    @property
    def history(self) -> str:
        """Where the history lies."""
        return str(self.path / "history.zarr")

    def checkpoints(self, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", keep, run=self.name)

    def leases(self, role: str = "learner") -> Leases:
        return Leases(self.path / "leases", role)

    def exists(self) -> bool:
        """Whether there is a run here."""
        return self._run_file.is_file()

    def create(self, document: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin a run: write run.json, exclusively and whole. ``document`` is plain JSON.

        ``overwrite`` removes the run that is here, and never anything but the parts of a run. Its
        leases stay: a learner of the old run that still lives is fenced by the new one's.
        Raises RunExistsError, StorageFullError.
        """
        parts = [part for part in _PARTS if (self.path / part).exists()]
        if self.exists():
            if not overwrite:
                raise self._taken()
            self._require_ours()
            # run.json last: an overwrite that is cut short still finds a run to overwrite.
            for part in (*parts, self._run_file.name):
                files.remove_tree(self.path / part)
        elif parts:
            raise RunExistsError(
                f"{self.path} holds {', '.join(parts)} and no run.json: it is not known whose they are. "
                "Remove them by hand or choose another run directory"
            )
        if not files.create(self._run_file, _encode(document)):
            raise self._taken()

    def update(self, document: Mapping[str, Any]) -> None:
        """Replace run.json whole: a run that is resumed with other settings."""
        self._require_ours()
        files.replace(self._run_file, _encode(document))

    def remove(self) -> None:
        """Undo `create` of a run in which nothing has happened yet."""
        self._require_ours()
        for part in (*_PARTS, self._run_file.name):
            files.remove_tree(self.path / part)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def document(self) -> dict[str, Any]:
        """What `create` was given. Raises RunNotFoundError, RunMismatchError for another format."""
        try:
            document = json.loads(self._run_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise RunNotFoundError(f"no run at {self.path}: it holds no run.json. Check the path") from None
        except ValueError as error:
            raise RunNotFoundError(f"{self._run_file} is not JSON: {error}. Restore it from a copy") from error
        if not isinstance(document, dict) or document.pop("kind", None) != KIND:
            raise RunNotFoundError(f"{self._run_file} is not one of dask_isgd. Check the path")
        name = document.get("run")
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            # it becomes part of keys, topics and pages
            raise RunNotFoundError(
                f"{self._run_file}: got run name {str(name)[:80]!r}, wanted 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'; "
                "the file was changed by hand"
            )
        if document.get("format_version") != FORMAT_VERSION:
            raise RunMismatchError(
                f"{self._run_file}: got format_version {document.get('format_version')!r}, wanted {FORMAT_VERSION}; "
                "use the version of dask_isgd that wrote it"
            )
        return document

    def control(self) -> dict[str, Any]:
        """What the user wants: ``{"want": "run" | "pause" | "stop", ...}``; "run" until told otherwise."""
        try:
            return {"want": "run", **json.loads(self._control_file.read_bytes())}
        except FileNotFoundError:
            return {"want": "run"}

    def set_control(self, **values: Any) -> None:
        """Change some of what the user wants, plain JSON; readers see the old or the new whole."""
        if values.get("want", "run") not in WANTS:
            raise ValueError(f"control: got want={values['want']!r}, wanted one of {', '.join(WANTS)}")
        self.document()  # only a run has a control
        files.replace(self._control_file, json.dumps({**self.control(), **values}).encode())

    def sweep(self, seconds: float = files.SWEEP_SECONDS) -> list[Path]:
        """Remove what killed writers left unfinished anywhere in the run more than ``seconds`` ago."""
        found = files.sweep(self.path, seconds=seconds)
        for part in ("weights.zarr", "history.zarr", "leases"):
            found += files.sweep(self.path / part, recursive=True, seconds=seconds)
        return found + self.checkpoints().sweep(seconds)

    @property
    def _run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def _control_file(self) -> Path:
        return self.path / "control.json"

    def _taken(self) -> RunExistsError:
        return RunExistsError(
            f"{self.path} holds a run already; pass resume=True to go on with it, "
            "overwrite=True to delete it and begin anew, or choose another run directory"
        )

    def _require_ours(self) -> None:
        try:
            self.document()
        except RunMismatchError:  # another version's, ours all the same
            pass
        except RunNotFoundError as error:
            raise RunExistsError(f"{self.path} is not overwritten: {error}") from error


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps({**document, "kind": KIND, "format_version": FORMAT_VERSION}, indent=1).encode()

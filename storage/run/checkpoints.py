"""Checkpoints that stay intact if a process crashes at any moment: a folder each, with tensors and a manifest.

A commit writes a temporary folder, syncs each file, the manifest with the checksums last,
renames the folder into place and syncs its parent. An object store has no rename; there the
manifest, put last, marks the commit. No pickle is ever read or written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from dask_isgd.errors import CheckpointError
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.stores import StorageOptions, open_folder

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

FORMAT_VERSION = 1
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{9,18})-i(\d{4,18})", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    name: str
    step: int
    incarnation: int
    tensors: dict[str, np.ndarray]
    """Writable arrays, as committed."""
    state: dict[str, Any]
    """Plain JSON: random state, feedback, whatever the learner resumes from."""


class Checkpoints:
    """The checkpoints of a run; if another incarnation reaches the same step, that is another checkpoint.

    ``keep``: how many of the latest, ordered by (incarnation, step), are kept. ``run`` is recorded
    in each manifest.
    """

    def __init__(
        self,
        url: str | Path | Folder,
        keep: int = 2,
        *,
        run: str | None = None,
        storage_options: StorageOptions = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoints: got keep={keep}, wanted at least 1")
        self.folder = url if isinstance(url, Folder) else open_folder(url, storage_options)
        self.keep = keep
        self.run = run

    def __repr__(self) -> str:
        return f"<Checkpoints {self.folder.url}: {', '.join(self.names()) or 'none'}>"

    def commit(self, step: int, incarnation: int, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> str:
        """Commit durably and return the name; then remove all but the latest ``keep``.

        Raises CheckpointError (it exists, or contains something that JSON or safetensors cannot hold) before
        anything is written, StorageFullError; in either case the older checkpoints remain unchanged.
        """
        step, incarnation = operator.index(step), operator.index(incarnation)
        name = f"step-{step:09d}-i{incarnation:04d}"
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"got step {step} and incarnation {incarnation}, wanted neither to be below zero")
        _require_plain(state, "state")
        packed = _pack(tensors)
        manifest = {
            "format_version": FORMAT_VERSION,
            "run": self.run,
            "incarnation": incarnation,
            "step": step,
            "files": {TENSORS: {"sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed)}},
            "state": dict(state),
        }
        manifest["sha256"] = _digest(manifest)
        try:
            text = json.dumps(manifest, indent=1, sort_keys=True).encode()
            self.folder.publish(name, {TENSORS: packed, MANIFEST: text})
        except FileExistsError:
            raise CheckpointError(
                f"checkpoint {self.folder.place(name)} exists and is never overwritten; "
                "commit a later step, or resume as a new incarnation"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.folder.place(name)} cannot be written: {error}. Older checkpoints are intact"
            ) from error
        self._prune(incarnation)
        return name

    def names(self) -> list[str]:
        """Return the committed checkpoints, verified or not, by (incarnation, step), the latest last."""
        return sorted((name for name in self.folder.published(MANIFEST) if _NAME.fullmatch(name)), key=_order)

    def orders(self) -> list[tuple[int, int]]:
        """Return (incarnation, step) of each committed checkpoint, verified or not, the latest last."""
        return [_order(name) for name in self.names()]

    def load(self, name: str) -> Checkpoint:
        """Read a checkpoint and verify format, sizes and checksums. Raises CheckpointError."""
        manifest = self.manifest(name)
        place = self.folder.place(name)
        try:
            packed = _read_verified(self.folder, f"{name}/{TENSORS}", manifest["files"][TENSORS])
            tensors = safetensors.numpy.load(packed)
        except OSError as error:
            raise CheckpointError(f"checkpoint {place} cannot be read: {error}. Use another one") from error
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"checkpoint {place}: {TENSORS} is malformed: {error}. Use another one") from error
        return Checkpoint(name, manifest["step"], manifest["incarnation"], tensors, manifest["state"])

    def manifest(self, name: str) -> dict[str, Any]:
        """Read and verify the manifest of a checkpoint: step, incarnation, state, files. Raises CheckpointError."""
        matched = _NAME.fullmatch(name)
        if not matched:
            raise CheckpointError(f"got checkpoint name {name!r}, wanted one such as 'step-000000100-i0001'")
        place = self.folder.place(name)
        try:
            manifest = _read_manifest(self.folder, f"{name}/{MANIFEST}")
        except OSError as error:
            raise CheckpointError(f"checkpoint {place} cannot be read: {error}. Use another one") from error
        if (manifest["step"], manifest["incarnation"]) != tuple(map(int, matched.groups())):
            raise CheckpointError(
                f"checkpoint {place}: got a manifest of step {manifest['step']}, incarnation "
                f"{manifest['incarnation']}, wanted those of the name; the folder was renamed or copied"
            )
        return manifest

    def latest(self, run: str | None = None) -> Checkpoint | None:
        """Return the latest checkpoint that verifies; those that do not are logged. None if there is no checkpoint.

        With ``run``, checkpoints whose state names another run do not count. Raises CheckpointError if there are
        checkpoints and none verifies: training from step 0 would bury what may still be repaired.
        """
        return self._latest(self.load, lambda found: found.state, run)

    def latest_manifest(self, run: str | None = None) -> dict[str, Any] | None:
        """Return the manifest of the latest checkpoint as `latest` does, without reading any tensor."""
        return self._latest(self.manifest, lambda found: found["state"], run)

    def _latest(self, read: Callable[[str], _T], state: Callable[[_T], Any], run: str | None) -> _T | None:
        names, wrong = self.names(), ""
        while names:
            wrong = ""
            for name in reversed(names):
                try:
                    found = read(name)
                except CheckpointError as error:
                    logger.warning("skipped a checkpoint that does not verify: %s", error)
                    wrong = wrong or str(error)
                    continue
                if run is None or state(found).get("run") == run:
                    return found
            former, names = names, self.names()
            if names == former:  # else they were pruned while they were read, and there are later ones
                break
        if wrong:
            raise CheckpointError(
                f"no checkpoint in {self.folder.url} verifies ({wrong}). Restore one from a copy, or delete that "
                "folder to begin again at step 0"
            )
        return None

    def sweep(self, seconds: float | None = None) -> list[str]:
        """Remove and return what killed writers left unfinished more than ``seconds`` ago."""
        return self.folder.sweep(seconds, mark=MANIFEST)

    def _prune(self, incarnation: int) -> None:
        """Remove older checkpoints, and never the latest of this ``incarnation``, even if others have a higher one.

        What is committed is safe already, so errors are logged, not raised.
        """
        try:
            names = self.names()
            own = [name for name in names if _order(name)[0] == incarnation]
            for name in set(names[: -self.keep]) - set(own[-self.keep :]):
                self.folder.withdraw(name, MANIFEST)
            self.sweep()
        except Exception as error:
            logger.warning("older checkpoints in %s were not removed: %s", self.folder.url, error)


def _order(name: str) -> tuple[int, int]:
    step, _, incarnation = name.removeprefix("step-").partition("-i")
    return int(incarnation), int(step)


def _pack(tensors: Mapping[str, np.ndarray]) -> bytes:
    for name, values in tensors.items():
        if not isinstance(name, str) or not isinstance(values, np.ndarray):
            raise CheckpointError(
                f"tensor {name!r}: got {type(values).__name__}, wanted a numpy array under a string name"
            )
    # safetensors writes an array in its memory order: a transposed one would be scrambled when it is read.
    native = {name: np.asarray(values, values.dtype.newbyteorder("="), order="C") for name, values in tensors.items()}
    try:
        return bytes(safetensors.numpy.save(native))
    except (safetensors.SafetensorError, TypeError, ValueError, KeyError) as error:
        kinds = {name: f"{values.dtype}{list(values.shape)}" for name, values in tensors.items()}
        raise CheckpointError(
            f"the tensors do not fit a checkpoint: {error}. Got {kinds}; wanted dtypes that safetensors knows"
        ) from error


def _require_plain(value: Any, where: str) -> None:
    """Refuse what JSON would refuse late or silently change: numpy values, keys that are not strings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: got the key {key!r}, wanted a string; JSON would change it")
            _require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _require_plain(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(f"{where}: got {type(value).__name__}, wanted plain JSON; put arrays among the tensors")


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of the manifest itself: a changed digit of a random state would otherwise go unnoticed."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_manifest(folder: Folder, name: str) -> dict[str, Any]:
    path = folder.place(name)
    try:
        manifest = json.loads(folder.read(name))
    except ValueError as error:
        raise CheckpointError(f"manifest {path} is not JSON: {error}. Use another checkpoint") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != _digest(manifest):
        raise CheckpointError(f"manifest {path} does not match its own checksum. Use another checkpoint")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"manifest {path}: got format {manifest.get('format_version')!r}, wanted {FORMAT_VERSION}; "
            "use the version of dask_isgd that wrote it"
        )
    # Nothing in a manifest is ever used as a path: it must name exactly the one file that exists.
    files = manifest.get("files")
    file = files.get(TENSORS) if isinstance(files, dict) and len(files) == 1 else None
    if not isinstance(file, dict) or not {"bytes", "sha256"} <= set(file):
        raise CheckpointError(f"manifest {path}: got files {files}, wanted {TENSORS} alone with its size and sha256")
    kinds = {"step": int, "incarnation": int, "state": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]:
        raise CheckpointError(f"manifest {path}: {', '.join(wrong)} missing or of the wrong kind. Use another one")
    return manifest


def _read_verified(folder: Folder, name: str, wanted: Mapping[str, Any]) -> bytes:
    path = folder.place(name)
    data = folder.read(name)
    if len(data) != wanted["bytes"]:
        raise CheckpointError(f"{path}: got {len(data)} bytes, wanted {wanted['bytes']}. Use another checkpoint")
    found = hashlib.sha256(data).hexdigest()
    if found != wanted["sha256"]:
        raise CheckpointError(f"{path}: got sha256 {found}, wanted {wanted['sha256']}. Use another checkpoint")
    return data

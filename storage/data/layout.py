"""The layout of a dataset: which arrays of a Zarr group are the inputs and which is the target.

In order of precedence: the user's arguments, the group's ``isgd`` attributes, the names of the
arrays. If that is ambiguous, the error lists the arrays and what to pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from dask_isgd.errors import DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.storage.backends.stores import Array, children
from dask_isgd.storage.backends.zarr_internals import dimension_names, has_regular_chunks, is_consolidated
from dask_isgd.storage.data.codecs import require_numeric

FORMAT_VERSION = 1
TARGET_NAMES = ("target", "label", "y")

Normalisation = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Layout:
    """An opened group, with its inputs and target identified."""

    store: Store
    group: str
    """Path of the group inside the store; empty for its root."""
    inputs: tuple[Array, ...]
    target: Array
    attributes: Mapping[str, Any]
    """The group's ``isgd`` attributes, empty if there are none."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (*self.inputs, self.target)


def open_layout(
    store: Store, group: str | None, inputs: Sequence[str] | None, target: str | None, dimension: str, where: str
) -> Layout:
    """Open a group and find its inputs and its target; ``where`` names the dataset in errors.

    Without a ``group``, this opens the group ``train`` if the root holds no arrays but that group.
    """
    found = find_group(store, group or "", where)
    arrays = _arrays(found)
    if group is None and not arrays and "train" in group_names(store, ""):
        return open_layout(store, "train", inputs, target, dimension, where)
    place = f"{where}, group {found.path!r}" if found.path else where
    if not arrays:
        _raise_no_arrays(place, group_names(store, found.path))
    attributes = _attributes(found, place)
    names: list[str] | None = list(inputs) if inputs is not None else attributes.get("inputs")
    target = target if target is not None else attributes.get("target")
    sampled = [name for name, array in arrays.items() if _along(array, dimension)]
    target = target if target is not None else _guess_target(sampled, place, dimension, names)
    if names is None:
        names = [name for name in sampled if name != target]
    if not names:
        raise DataError(
            f"{place}: no input array besides the target {target!r} has the dimension {dimension!r}; "
            f"got {_listing(arrays)}. Pass inputs=[...] or dimension=..."
        )
    for name in (*names, target):
        if name not in arrays:
            raise DataError(f"{place}: no array {name!r}; got {_listing(arrays)}. Pass inputs=... and target=...")
        if not _along(arrays[name], dimension):
            raise DataError(
                f"{place}: array {name!r} has the dimensions {dimension_names(arrays[name])}, "
                f"wanted {dimension!r} first. Transpose it or pass dimension=..."
            )
    if target in names or len(set(names)) < len(names):
        raise DataError(f"{place}: got inputs {names} and target {target!r}, wanted each array once")
    layout = Layout(store, found.path, tuple(arrays[name] for name in names), arrays[target], attributes)
    for array in layout.arrays:
        require_numeric(array, place)
    _same_grid(layout, place)
    return layout


def find_group(store: Store, path: str, where: str) -> zarr.Group:
    """Open a group for reading; EmptyDatasetError lists the groups that do exist."""
    try:
        return zarr.open_group(store, path=path, mode="r")
    except FileNotFoundError:
        parent = path.rpartition("/")[0]
        known = ", ".join(map(repr, group_names(store, parent))) or "none"
        what = f"no group {path!r}" if path else "no Zarr group"
        raise EmptyDatasetError(
            f"{where}: {what}; groups that exist: {known}. Check the URL, or prepare the data first"
        ) from None


def group_names(store: Store, path: str) -> list[str]:
    """Return the groups directly below ``path``, from consolidated metadata if there are any, else from a listing."""
    try:
        group = zarr.open_group(store, path=path, mode="r")
        if is_consolidated(group):  # a web server offers no listing
            return sorted(name for name, _ in group.groups())
    except FileNotFoundError:
        pass
    names = []
    for name in children(store, path):
        if name.endswith((".json", ".partial")) or name.startswith(".z"):
            continue
        try:
            zarr.open_group(store, path=f"{path}/{name}" if path else name, mode="r")
        except (FileNotFoundError, ValueError):  # a folder, a file or an array
            continue
        names.append(name)
    return names


def read_normalisation(layout: Layout) -> Normalisation | None:
    """Return mean and standard deviation of each input as float32; an attribute may name a separate array."""
    entries = layout.attributes.get("normalisation")
    if not entries:
        return None

    def open_array(name: str) -> Any:
        array = zarr.open_array(layout.store, path=f"{layout.group}/{name}".lstrip("/"), mode="r")
        require_numeric(array, "normalisation")
        return array[...]

    def constant(value: Any) -> np.ndarray:
        return np.asarray(open_array(value) if isinstance(value, str) else value, dtype=np.float32)

    return {name: (constant(entry["mean"]), constant(entry["std"])) for name, entry in entries.items()}


def _arrays(group: zarr.Group) -> dict[str, Array]:
    if is_consolidated(group):  # one request for all, where a store has it
        return {name: array for name, array in group.arrays() if array.ndim}
    arrays = {}
    for name in children(group.store, group.path):
        if name.endswith((".json", ".partial")) or name.startswith(".z"):
            continue
        try:
            array = zarr.open_array(group.store, path=f"{group.path}/{name}" if group.path else name, mode="r")
        except (FileNotFoundError, ValueError):  # a group or a foreign folder
            continue
        if array.ndim:
            arrays[name] = array
    return arrays


def _attributes(group: zarr.Group, place: str) -> dict[str, Any]:
    attributes: Any = group.attrs.get("isgd", {})
    version = attributes.get("format_version", FORMAT_VERSION) if isinstance(attributes, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{place}: got dataset format {version!r}, wanted {FORMAT_VERSION}; "
            "open it with the version of dask_isgd that wrote it, or prepare it again"
        )
    return dict(attributes)


def _along(array: Array, dimension: str) -> bool:
    return dimension_names(array)[0] in (None, dimension)


def _guess_target(sampled: list[str], place: str, dimension: str, inputs: Sequence[str] | None) -> str:
    free = [name for name in sampled if name not in (inputs or ())]
    likely = [name for name in TARGET_NAMES if name in free]
    if not likely and inputs and len(free) == 1:
        likely = free
    if len(likely) == 1:
        return likely[0]
    raise DataError(
        f"{place}: cannot identify the target among the arrays along {dimension!r}: "
        f"{', '.join(map(repr, sampled)) or 'none'}. Pass inputs=... and target=..."
    )


def _same_grid(layout: Layout, place: str) -> None:
    lengths = {array.basename: array.shape[0] for array in layout.arrays}
    if len(set(lengths.values())) > 1:
        raise LengthMismatchError(f"{place}: got lengths {lengths}, wanted the same for all; prepare the data again")
    irregular = [array.basename for array in layout.arrays if not has_regular_chunks(array)]
    if irregular:
        raise DataError(
            f"{place}: got chunks of different shapes in {irregular}, wanted one shape; write them again with "
            f"`{_command(layout)}`"
        )
    chunks = {array.basename: array.chunks[0] for array in layout.arrays}
    # The chunk sizes must agree even if each array has a single chunk; only empty arrays may differ.
    if len(set(chunks.values())) > 1 and lengths[layout.target.basename]:
        raise DataError(
            f"{place}: got rows per chunk {chunks}, wanted the same for all; write them again with `{_command(layout)}`"
        )


def _command(layout: Layout) -> str:
    """Return the command that writes the arrays as a dataset, chunked alike."""
    root = str(layout.store.root) if isinstance(layout.store, LocalStore) else "URL"
    source = f"{root}/{layout.group}".rstrip("/")
    name = source.rpartition("/")[2].removesuffix(".zarr")
    inputs = " ".join(f"--input {array.basename}" for array in layout.inputs)
    return f"dask isgd prepare {source} --to {name}-even.zarr {inputs} --target {layout.target.basename}"


def _listing(arrays: Mapping[str, Array]) -> str:
    return "the arrays " + ", ".join(f"{name!r} {array.shape}" for name, array in arrays.items())


def _raise_no_arrays(place: str, groups: list[str]) -> NoReturn:
    known = ", ".join(map(repr, groups)) or "none"
    raise EmptyDatasetError(f"{place}: the group holds no arrays; groups in it: {known}. Pass group=...")

"""Files of numpy: an .npz file, or several .npy files that are mapped into memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from dask.utils import format_bytes

from dask_isgd.errors import DataError
from dask_isgd.storage.tables.arrays import ArrayTable


def open_numpy(place: Any, *, names: Sequence[str] | None = None) -> ArrayTable:
    """Return the arrays of an .npz file (all, or only ``names``), or of .npy files by name.

    Raises DataError if they cannot be read.
    """
    try:
        if isinstance(place, Mapping):
            return ArrayTable({name: np.load(path, mmap_mode="r") for name, path in place.items()})
        _check_unpacked_size(place)
        with np.load(place) as archive:
            return ArrayTable({name: archive[name] for name in archive.files if names is None or name in names})
    except DataError:
        raise
    except Exception as error:  # numpy parses the header of a file as Python, and raises whatever that does
        raise DataError(f"{place}: cannot be read by numpy ({error})") from error


def _check_unpacked_size(path: str | Path) -> None:
    """Refuse an .npz file that would unpack to more bytes than its headers promise, or than memory is free."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            _check_member(path, archive, member)
    size, free = sum(member.file_size for member in members), psutil.virtual_memory().available
    if size > free:
        raise DataError(
            f"{path}: got arrays of {format_bytes(size)} and {format_bytes(free)} of free memory, wanted them to "
            "fit; unpack the file and name its members, which are read block by block: numpy: {name: name.npy, …}"
        )


def _check_member(path: str | Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # With other methods a few bytes may expand to gigabytes at once.
        raise DataError(f"{path}: got {member.filename} in a compression that numpy never writes")
    with archive.open(member) as file:
        major, _ = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        promised = file.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and member.file_size != promised:  # numpy itself refuses objects
        raise DataError(
            f"{path}: got {member.file_size:,} bytes for {member.filename}, wanted {promised:,} for {dtype}"
            f"{list(shape)}; save the file again"
        )

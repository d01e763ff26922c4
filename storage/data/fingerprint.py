"""What identifies the data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dask_isgd.storage.backends.stores import Array
from dask_isgd.storage.data.chunks import Chunks


def fingerprint(chunks: Chunks, inputs: Sequence[Array], target: Array) -> dict[str, Any]:
    """Return names, shapes, dtypes, rows per chunk, and sha256 of the decoded first, middle and last chunk, as JSON."""
    sampled = sorted({0, chunks.count // 2, chunks.count - 1}) if chunks.count else []
    found: dict[str, Any] = {"inputs": [array.basename for array in inputs], "target": target.basename, "arrays": {}}
    for array in (*inputs, target):
        checksums = {
            str(i): hashlib.sha256(_little_endian(chunks.read(array, *chunks.bounds(i)))).hexdigest() for i in sampled
        }
        found["arrays"][array.basename] = {
            "shape": [int(extent) for extent in array.shape],
            "dtype": array.dtype.newbyteorder("<").str,
            "chunk": chunks.size,
            "sha256": checksums,
        }
    return found


def _little_endian(rows: np.ndarray) -> bytes:
    return rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()

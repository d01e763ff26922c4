"""1,797 handwritten digits, 8×8 pixels, 10 classes; the file is part of this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.storage.data.prepared import finished
from dask_isgd.storage.tables.arrays import ArrayTable

SEED = 42
TEST_FRACTION = 0.2
CHUNK = 64
IDENTITY = {"pipeline": "digits", "version": 1, "seed": SEED}


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train`` and ``test``, 80 % and 20 % of every class, in random order; return ``url``.

    ``image`` (N, 8, 8) u1 with one mean and deviation for all pixels, ``label`` (N) i8.
    """
    if source is not None:
        raise DataError(
            f"digits: got the folder {source!r}, wanted none: the dataset comes with dask_isgd; leave out --from"
        )
    if finished(url, IDENTITY):
        return url
    images, labels = load()
    train, test = stratified(labels, TEST_FRACTION, SEED)
    table = ArrayTable({"image": images, "label": labels}, class_names=[*"0123456789"])
    return ingest(table, url, splits={"train": train, "test": test}, chunk_size=CHUNK, identity=IDENTITY)


def load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all images (1797, 8, 8) with values from 0 to 16, and their labels (1797,)."""
    rows = np.loadtxt(Path(__file__).parent / "data" / "digits.csv.gz", dtype=np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def stratified(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of (the rest, ``fraction`` of every class), both in random order."""
    rng = np.random.default_rng(seed)
    held_out, kept = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(fraction * len(members))
        held_out.append(members[:cut])
        kept.append(members[cut:])
    return rng.permutation(np.concatenate(kept)), rng.permutation(np.concatenate(held_out))

"""Statlog Shuttle: 58,000 states of a space shuttle's radiators, 9 numbers each, 7 classes, four of them rare.

A problem for importance sampling: 99.6 % of the examples belong to three classes and are soon learned. The file is from
the R package mlbench (Leisch and Dimitriadou; GPL-2), which has it from the UCI repository.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.extras import needs
from dask_isgd.pipelines.datasets.sources import Source
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.storage.data.prepared import finished
from dask_isgd.storage.tables.arrays import ArrayTable

TRAIN = 43_500
"""Statlog's own split: the first examples are for training, the others for tests."""
CHUNK = 512
SEED = 42
IDENTITY = {"pipeline": "shuttle", "version": 1, "seed": SEED}

SOURCE = Source(
    name="shuttle",
    files={"Shuttle.rda": "5b1db218b76a47c83f575f1ff38d7a7d36e569b0e27d8bf4aa92eae6c0bcb826"},
    variable="ISGD_SHUTTLE",
    folders=("/usr/lib/R/site-library/mlbench/data", "/usr/lib/R/library/mlbench/data"),
    advice="on Debian `apt install r-cran-mlbench`",
)


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train``, in random order, and ``test``; return ``url``.

    ``state`` (N, 9) f4, of which each number has its own mean and deviation, ``label`` (N) i8. ``Shuttle.rda`` comes
    from the folder ``source``, from that in $ISGD_SHUTTLE, or from Debian's package. Raises DataError.
    """
    if finished(url, IDENTITY):
        return url
    states, labels, names = _read(SOURCE.find(source)["Shuttle.rda"])
    table = ArrayTable({"state": states, "label": labels}, class_names=names)
    splits = {"train": np.random.default_rng(SEED).permutation(TRAIN), "test": np.arange(TRAIN, table.length)}
    return ingest(
        table, url, splits=splits, chunk_size=CHUNK, normalise={"state": "each"}, identity=IDENTITY, target="label"
    )


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Return states (N, 9), labels (N) and the names of the classes."""
    with needs("datasets", "the dataset shuttle"):
        import rdata
    try:
        with warnings.catch_warnings():  # the file does not say that its text is ASCII
            warnings.simplefilter("ignore", UserWarning)
            frame = rdata.read_rda(path).get("Shuttle")
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"shuttle: {path} cannot be read as a file of R ({error})") from error
    if frame is None or frame.shape[1] != 10 or len(frame) <= TRAIN or "Class" not in frame:
        got = "no frame Shuttle" if frame is None else f"a frame of shape {frame.shape}"
        raise DataError(f"shuttle: got {got} in {path}, wanted one of 58,000 rows with 9 numbers and a column Class")
    classes = frame["Class"].cat
    states = frame.drop(columns="Class").to_numpy(dtype=np.float32)
    return states, classes.codes.to_numpy(dtype=np.int64), [str(name) for name in classes.categories]

"""SVHN, cropped: 630,420 house numbers of 32×32 pixels in colour, 10 classes.

Netzer et al. 2011. The split and the normalisation are those of arXiv 1511.06481: ``train`` and ``extra`` together,
5 % of them held out for validation, and a mean and deviation per pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LengthMismatchError
from dask_isgd.pipelines.datasets.matlab import Variable, open_variable
from dask_isgd.pipelines.datasets.sources import Source
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.storage.data.prepared import finished
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import even_blocks

CHUNK = 512
SEED = 42
VALIDATION_FRACTION = 0.05
IDENTITY = {"pipeline": "svhn", "version": 1, "seed": SEED}
_SKIP_ROWS = 4096
_MAX_LABELS = 10_000_000

SOURCE = Source(
    name="svhn",
    files={
        "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        "extra_32x32.mat": "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
        "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    },
    base_url="https://ufldl.stanford.edu/housenumbers",
    limit=1_500_000_000,
    variable="ISGD_SVHN",
    advice="get them from http://ufldl.stanford.edu/housenumbers/ (format 2)",
)


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train`` and ``validation``, in random order, and ``test``; return ``url``.

    ``image`` (N, 3, 32, 32) u1 with mean and deviation per pixel, ``label`` (N) i8, 0 to 9. The files come from the
    folder ``source``, from that in $ISGD_SVHN, or from the web. This needs a few hundred MB of memory and, while it
    runs, disk space for a second copy of the images (1.9 GB).
    """
    if finished(url, IDENTITY):
        return url
    files = SOURCE.find(source)
    with SvhnTable([files[f"{name}_32x32.mat"] for name in ("train", "extra", "test")]) as table:
        shuffled = sum(table.lengths[:2])
        if shuffled < 2:
            raise DataError(f"svhn: got {shuffled} examples in train and extra, wanted at least 2")
        order = np.random.default_rng(SEED).permutation(shuffled)
        held_out = max(1, round(VALIDATION_FRACTION * shuffled))
        splits = {
            "train": order[held_out:],
            "validation": order[:held_out],
            "test": np.arange(shuffled, table.length),
        }
        return ingest(table, url, splits=splits, chunk_size=CHUNK, normalise="each", identity=IDENTITY)


class SvhnTable:
    """The images and labels of several files, one file after another, as a `Table`.

    Images are decompressed from the start of a file on. Reading blocks in order decompresses each file once.
    """

    class_names: Sequence[str] | None = [*"0123456789"]

    def __init__(self, paths: Sequence[Path]) -> None:
        self._labels = [_read_labels(path) for path in paths]
        self._images = [_Images(path, len(labels)) for path, labels in zip(paths, self._labels, strict=True)]
        self.lengths = [len(labels) for labels in self._labels]
        """Rows of each file."""
        self.length = sum(self.lengths)
        self.columns = {"image": Column((3, 32, 32), np.dtype("u1")), "label": Column((), np.dtype("i8"))}

    def __enter__(self) -> SvhnTable:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for images in self._images:
            images.close()

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        first = 0
        for labels, images in zip(self._labels, self._images, strict=True):
            a, b = max(start - first, 0), min(stop - first, len(labels))
            if a < b:
                for name, parts in found.items():
                    parts.append(labels[a:b] if name == "label" else images.read(a, b))
            first += len(labels)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)


class _Images:
    """The images of one file, read in order; reading earlier rows again starts at the top of the file."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count
        self._file: BinaryIO | None = None
        self._position = 0
        with path.open("rb") as file:
            self._find(file)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return rows ``start`` to ``stop`` (excluded), (n, 3, 32, 32)."""
        if self._file is None or start < self._position:
            self.close()
            self._file = self._path.open("rb")
            self._variable, self._position = self._find(self._file), 0
        while self._position < start:
            skipped = min(_SKIP_ROWS, start - self._position)
            self._variable.read(skipped)
            self._position += skipped
        rows = self._variable.read(stop - start)
        self._position = stop
        return rows.transpose(0, 1, 3, 2)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _find(self, file: BinaryIO) -> Variable:
        """Return the variable of the images, which MATLAB stores as (32, 32, 3, N)."""
        images = _variable(file, self._path, "X")
        if len(images.shape) != 4 or images.shape[:3] != (32, 32, 3):
            raise DataError(f"{self._path}: got X uint8{images.shape}, wanted uint8(32, 32, 3, N)")
        if images.shape[3] != self._count:
            raise LengthMismatchError(
                f"{self._path}: got X of {images.shape[3]} examples, y of {self._count}; download the file again"
            )
        return images


def _read_labels(path: Path) -> NDArray[np.int64]:
    """Return the labels of a file, (N,). The file's class 10, the digit 0, becomes 0."""
    with path.open("rb") as file:
        variable = _variable(file, path, "y")
        if len(variable.shape) != 2 or variable.shape[1] != 1 or variable.shape[0] > _MAX_LABELS:
            raise DataError(f"{path}: got y uint8{variable.shape}, wanted uint8(N, 1), N at most {_MAX_LABELS:,}")
        labels = variable.read(1).ravel()
    if labels.size == 0 or labels.min() < 1 or labels.max() > 10:
        got = f"labels {labels.min()} to {labels.max()}" if labels.size else "no labels"
        raise DataError(f"{path}: got {got}, wanted 1 to 10")
    return (labels % 10).astype(np.int64)


def _variable(file: BinaryIO, path: Path, name: str) -> Variable:
    variable = open_variable(file, path, name)
    if variable is None:
        raise DataError(f"{path}: got no variable {name!r}, wanted the cropped digits (format 2) with X and y")
    return variable

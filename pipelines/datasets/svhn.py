"""SVHN, cropped: 630,420 house numbers of 32×32 pixels in colour, 10 classes.

Netzer et al. 2011; the split and the normalisation are those of arXiv 1511.06481: ``train`` and
``extra`` together, 5 % of them held out for validation, mean and deviation for each pixel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LengthMismatchError
from dask_isgd.pipelines.datasets.matlab import open_variable
from dask_isgd.pipelines.datasets.sources import Source
from dask_isgd.pipelines.ingestion.prepared import prepare as prepare_once
from dask_isgd.storage.data.writing import Column, create_split, finish_split

CHUNK = 512
SEED = 42
VALIDATION_SHARE = 0.05
_SHAPE = (3, 32, 32)
_ROW_BYTES = 3 * 32 * 32
_BLOCK = 16 * CHUNK
_MOST_LABELS = 10_000_000

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
    """Write groups ``train`` and ``validation``, in random order, and ``test``.

    ``image`` (N, 3, 32, 32) u1 with mean and deviation per pixel, ``label`` (N) i8, 0 to 9. The
    files come from ``source``, $ISGD_SVHN, or https. Some hundred MB of memory do; while it runs, it needs
    disk space for a second copy of the images (1.9 GB).
    """
    return prepare_once(url, {"pipeline": "svhn", "version": 1, "seed": SEED}, lambda path: _write(path, source))


def _write(path: str, source: str | None) -> None:
    files = SOURCE.find(source)
    train, extra = files["train_32x32.mat"], files["extra_32x32.mat"]
    parts = [_labels(train), _labels(extra)]
    labels, counts = np.concatenate(parts), [len(part) for part in parts]
    order = np.random.default_rng(SEED).permutation(len(labels))
    held = max(1, round(VALIDATION_SHARE * len(labels)))
    if held >= len(labels):
        raise DataError(f"svhn: got {len(labels)} examples in train and extra, wanted at least 2")
    with tempfile.TemporaryDirectory(prefix=".svhn-", dir=Path(path).parent) as folder:
        # A block at a time is in memory: its rows go to their shuffled places in a file.
        place = np.empty(len(labels), np.int64)
        place[order] = np.arange(len(labels))
        with (Path(folder) / "images").open("wb+") as images:
            start = 0
            for file, count in zip((train, extra), counts, strict=True):
                for rows in _images(file, count):
                    for at, row in zip(place[start : start + len(rows)].tolist(), rows, strict=True):
                        images.seek(at * _ROW_BYTES)
                        images.write(row.tobytes())
                    start += len(rows)
            mean, std = pixel_statistics(_from_file(images, held, len(labels)))
            normalisation = {"image": {"mean": mean, "std": std}}
            shuffled = labels[order]
            _split(path, "train", _from_file(images, held, len(labels)), shuffled[held:], normalisation)
            _split(path, "validation", _from_file(images, 0, held), shuffled[:held], normalisation)
    test = _labels(files["test_32x32.mat"])
    _split(path, "test", _images(files["test_32x32.mat"], len(test)), test, normalisation)


def pixel_statistics(blocks: Iterable[NDArray[np.uint8]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each pixel over examples that come in blocks (n, ...).

    A pixel that never changes gets a deviation of 1: it becomes 0, not infinite.
    """
    total = square = np.zeros(())
    count = 0
    # Sums of bytes and of their squares are whole numbers, exact in float64 below 2^53.
    for rows in blocks:
        wide = rows.astype(np.float64)
        total = total + wide.sum(axis=0)
        square = square + np.square(wide, out=wide).sum(axis=0)
        count += len(rows)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    return mean, np.where(std > 0, std, 1.0)


def _from_file(images: BinaryIO, first: int, last: int) -> Iterator[NDArray[np.uint8]]:
    """Rows ``first`` to ``last`` (excluded) in blocks of whole chunks."""
    for start in range(first, last, _BLOCK):
        stop = min(start + _BLOCK, last)
        images.seek(start * _ROW_BYTES)
        yield np.frombuffer(images.read((stop - start) * _ROW_BYTES), np.uint8).reshape(stop - start, *_SHAPE)


def _split(
    path: str, split: str, blocks: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64], normalisation: Any
) -> None:
    columns = {"image": Column(_SHAPE, np.dtype("u1")), "label": Column((), np.dtype("i8"))}
    arrays = create_split(path, split, columns, len(labels), CHUNK)
    arrays["label"][...] = labels
    start = 0
    for rows in blocks:
        arrays["image"][start : start + len(rows)] = rows
        start += len(rows)
    finish_split(path, split, columns, {"inputs": ["image"], "target": "label", "classes": 10}, normalisation)


def _images(path: Path, count: int) -> Iterator[NDArray[np.uint8]]:
    """Blocks (n, 3, 32, 32) of the file's examples, which it has as (32, 32, 3, N)."""
    with path.open("rb") as file:
        images = open_variable(file, path, "X")
        if images is None:
            raise DataError(f"{path}: got no variable 'X', wanted the cropped digits (format 2) with X and y")
        if len(images.shape) != 4 or images.shape[:3] != (32, 32, 3):
            raise DataError(f"{path}: got X uint8{images.shape}, wanted uint8(32, 32, 3, N)")
        if images.shape[3] != count:
            raise LengthMismatchError(f"{path}: got X of {images.shape[3]} examples, y of {count}; get the file anew")
        for rows in images.examples(_BLOCK):
            yield rows.transpose(0, 1, 3, 2)


def _labels(path: Path) -> NDArray[np.int64]:
    """(N,), with the file's 10 for the digit 0 made 0."""
    with path.open("rb") as file:
        variable = open_variable(file, path, "y")
        if variable is None:
            raise DataError(f"{path}: got no variable 'y', wanted the cropped digits (format 2) with X and y")
        if len(variable.shape) != 2 or variable.shape[1] != 1 or variable.shape[0] > _MOST_LABELS:
            raise DataError(f"{path}: got y uint8{variable.shape}, wanted uint8(N, 1), N at most {_MOST_LABELS:,}")
        labels = next(variable.examples(1)).ravel()
    if labels.size == 0 or labels.min() < 1 or labels.max() > 10:
        got = f"labels {labels.min()} to {labels.max()}" if labels.size else "no labels"
        raise DataError(f"{path}: got {got}, wanted 1 to 10")
    return (labels % 10).astype(np.int64)

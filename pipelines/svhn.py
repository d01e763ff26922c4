"""SVHN, cropped: 630,420 house numbers of 32×32 pixels in colour, 10 classes.

Netzer et al. 2011; the split and the normalisation are those of arXiv 1511.06481: ``train`` and
``extra`` together, 5 % of them held out for validation, mean and deviation for each pixel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LengthMismatchError
from dask_isgd.pipelines.prepared import prepare as prepare_once
from dask_isgd.pipelines.sources import Source
from dask_isgd.storage import write_dataset

CHUNK = 512
SEED = 42
VALIDATION_SHARE = 0.05
_SHAPE = (3, 32, 32)
_BLOCK = 8192

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
    files come from ``source``, $ISGD_SVHN, or https. Needs memory for the largest file (1.6 GB) and,
    while it runs, disk space for a second copy of the images.
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
        # One file at a time is in memory: its rows go to their shuffled places in a file of their own.
        images = np.memmap(Path(folder) / "images", np.uint8, "w+", shape=(len(labels), *_SHAPE))
        place = np.empty(len(labels), np.int64)
        place[order] = np.arange(len(labels))
        start = 0
        for file, count in zip((train, extra), counts, strict=True):
            for rows in _blocks(_images(file, count)):
                images[place[start : start + len(rows)]] = rows
                start += len(rows)
        mean, std = pixel_statistics(images[held:])
        normalisation = {"image": {"mean": mean, "std": std}}
        shuffled = labels[order]
        _split(path, "train", images[held:], shuffled[held:], normalisation)
        _split(path, "validation", images[:held], shuffled[:held], normalisation)
        del images
    test_labels = _labels(files["test_32x32.mat"])
    test_images = np.ascontiguousarray(_images(files["test_32x32.mat"], len(test_labels)))
    _split(path, "test", test_images, test_labels, normalisation)


def pixel_statistics(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each pixel over the examples (N, ...), read in blocks.

    A pixel that never changes gets a deviation of 1: it becomes 0, not infinite.
    """
    total = np.zeros(images.shape[1:])
    square = np.zeros(images.shape[1:])
    # Sums of bytes and of their squares are whole numbers, exact in float64 below 2^53.
    for rows in _blocks(images):
        wide = rows.astype(np.float64)
        total += wide.sum(axis=0)
        square += np.square(wide, out=wide).sum(axis=0)
    mean = total / len(images)
    std = np.sqrt(np.maximum(square / len(images) - mean**2, 0))
    return mean, np.where(std > 0, std, 1.0)


def _blocks(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), _BLOCK):
        yield images[start : start + _BLOCK]


def _split(path: str, split: str, images: NDArray[np.uint8], labels: NDArray[np.int64], normalisation: Any) -> None:
    write_dataset(
        path,
        split,
        {"image": images, "label": labels},
        inputs="image",
        target="label",
        chunk_size=CHUNK,
        classes=10,
        normalisation=normalisation,
    )


def _load(path: Path, variable: str) -> NDArray[Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=[variable])
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB file ({error}); get the file anew") from error
    if variable not in content:
        raise DataError(f"{path}: got no variable {variable!r}, wanted the cropped digits (format 2) with X and y")
    array: NDArray[Any] = content[variable]
    return array


def _images(path: Path, count: int) -> NDArray[np.uint8]:
    """(N, 3, 32, 32), a view: in MATLAB's order of (32, 32, 3, N) an example lies in one piece."""
    images = _load(path, "X")
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise DataError(f"{path}: got X {images.dtype}{images.shape}, wanted uint8(32, 32, 3, N)")
    if images.shape[3] != count:
        raise LengthMismatchError(f"{path}: got X of {images.shape[3]} examples, y of {count}; get the file anew")
    return images.transpose(3, 2, 0, 1)


def _labels(path: Path) -> NDArray[np.int64]:
    """(N,), with the file's 10 for the digit 0 made 0."""
    labels = _load(path, "y").ravel()
    if labels.size == 0 or labels.min() < 1 or labels.max() > 10:
        got = f"labels {labels.min()} to {labels.max()}" if labels.size else "no labels"
        raise DataError(f"{path}: got {got}, wanted 1 to 10")
    return (labels % 10).astype(np.int64)

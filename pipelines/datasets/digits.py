"""The 1,797 handwritten digits that come with scikit-learn: 8×8 pixels, 10 classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.prepared import prepare as prepare_once
from dask_isgd.storage import write_dataset

SEED = 42
TEST_SHARE = 0.2
CHUNK = 64


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train`` and ``test``, 80 % and 20 % of every class, in random order.

    ``image`` (N, 8, 8) u1 with one mean and deviation for all pixels, ``label`` (N) i8.
    """
    if source is not None:
        raise DataError(f"digits: got the folder {source!r}, wanted none: it comes with scikit-learn; leave --from out")
    return prepare_once(url, {"pipeline": "digits", "version": 1, "seed": SEED}, _write)


def stratified(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of (the rest, ``share`` of every class), both in random order."""
    rng = np.random.default_rng(seed)
    held, kept = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(share * len(members))
        held.append(members[:cut])
        kept.append(members[cut:])
    return rng.permutation(np.concatenate(kept)), rng.permutation(np.concatenate(held))


def _write(path: str) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.astype(np.uint8), data.target.astype(np.int64)
    train, test = stratified(labels, TEST_SHARE, SEED)
    normalisation = {"image": {"mean": float(images[train].mean()), "std": float(images[train].std())}}
    for split, rows in (("train", train), ("test", test)):
        write_dataset(
            path,
            split,
            {"image": images[rows], "label": labels[rows]},
            inputs="image",
            target="label",
            chunk_size=CHUNK,
            classes=10,
            normalisation=normalisation,
        )

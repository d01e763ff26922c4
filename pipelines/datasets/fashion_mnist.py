"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28×28 pixels, 10 classes.

Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LengthMismatchError
from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.pipelines.datasets.sources import Source
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.storage.data.prepared import finished
from dask_isgd.storage.tables.arrays import ArrayTable

CHUNK = 512
SEED = 42
_MOST_BYTES = 1 << 26
"""Size of the largest array of the dataset, 47 MB, and a little more."""
IDENTITY = {"pipeline": "fashion-mnist", "version": 1, "seed": SEED}
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

SOURCE = Source(
    name="fashion-mnist",
    files={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    base_url="https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    limit=40_000_000,
    variable="ISGD_FASHION_MNIST",
    folders=("/usr/share/datasets/fashion-mnist",),
    advice="on Debian `apt install dataset-fashion-mnist`",
)


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train``, in random order, and ``test``; return ``url``.

    ``image`` (N, 28, 28) u1 with one mean and deviation for all pixels, ``label`` (N) i8. The files come from the
    folder ``source``, from that in $ISGD_FASHION_MNIST, from Debian's package, or from the web.
    """
    if finished(url, IDENTITY):
        return url
    files = SOURCE.find(source)
    (train, train_labels), (test, test_labels) = _read(files, "train"), _read(files, "t10k")
    table = ArrayTable(
        {
            "image": np.concatenate([train, test]),
            "label": np.concatenate([train_labels, test_labels]).astype(np.int64),
        },
        class_names=CLASSES,
    )
    splits = {
        "train": np.random.default_rng(SEED).permutation(len(train)),
        "test": np.arange(len(train), table.length),
    }
    return ingest(table, url, splits=splits, chunk_size=CHUNK, identity=IDENTITY)


def _read(files: Mapping[str, Path], prefix: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images (N, 28, 28) and labels (N) of a split."""
    images = read_idx(files[f"{prefix}-images-idx3-ubyte.gz"], limit=_MOST_BYTES)
    labels = read_idx(files[f"{prefix}-labels-idx1-ubyte.gz"], limit=_MOST_BYTES)
    split = "train" if prefix == "train" else "test"
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(f"fashion-mnist {split}: got images {images.shape} and labels {labels.shape}, wanted 3-d, 1-d")
    if len(images) != len(labels):
        raise LengthMismatchError(f"fashion-mnist {split}: got {len(images)} images and {len(labels)} labels")
    return images, labels

"""Random places on the sphere: what the pipelines of the Earth have in common."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_places(count: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """Return latitudes and longitudes (N) in degrees, and unit vectors (N, 3), of places uniform on the sphere."""
    rng = np.random.default_rng(seed)
    sine, longitude = rng.uniform(-1.0, 1.0, count), rng.uniform(-np.pi, np.pi, count)
    cosine = np.sqrt(1.0 - sine**2)
    vectors = np.stack([cosine * np.cos(longitude), cosine * np.sin(longitude), sine], axis=1)
    return np.degrees(np.arcsin(sine)), np.degrees(longitude), vectors.astype(np.float32)


def halves(train: int, total: int) -> dict[str, NDArray[np.int64]]:
    """Return the rows of ``train`` and ``test``; places are in random order already."""
    return {"train": np.arange(train), "test": np.arange(train, total)}

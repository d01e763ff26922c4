"""Folders of images, one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.extras import needs
from dask_isgd.pipelines.ingestion.tables.table import even_blocks
from dask_isgd.storage.data.writing import Column

_LARGEST = 16_384
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageTable:
    """Images in one folder per class, ``FOLDER/CLASS/NAME.png``.

    The columns are ``image`` (N, channels, height, width) u1 and ``label`` (N) i8. ``size`` is (height, width), to
    which images are resized; None: all must have the same size. ``mode`` is ``"RGB"``, or ``"L"`` for greyscale.
    Classes are numbered in the order of their names. Needs Pillow.
    """

    def __init__(self, folder: str | Path, *, size: Sequence[int] | None = None, mode: str = "RGB") -> None:
        root = Path(folder)
        names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        found = [(path, label) for label, name in enumerate(names) for path in sorted((root / name).rglob("*"))]
        self._files = [(str(path), label) for path, label in found if path.suffix.lower() in SUFFIXES]
        if not self._files:
            raise EmptyDatasetError(
                f"{root}: got no images, wanted FOLDER/CLASS/NAME.png (or {', '.join(SUFFIXES[1:])})"
            )
        if mode not in ("RGB", "L"):
            raise DataError(f"images: got mode {mode!r}, wanted 'RGB' or 'L'")
        self.class_names: Sequence[str] | None = names
        self._mode, self._resize = mode, size is not None
        self._size = _height_and_width(size) if size is not None else self._open(0)[1:]
        self.length = len(self._files)
        channels = 3 if mode == "RGB" else 1
        self.columns = {
            "image": Column((channels, *self._size), np.dtype("u1")),
            "label": Column((), np.dtype("i8")),
        }

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        if "label" in names:
            found["label"] = np.array([label for _, label in self._files[start:stop]], np.int64)
        if "image" in names:
            found["image"] = np.empty((stop - start, *self.columns["image"].shape), np.uint8)
            for i in range(start, stop):
                found["image"][i - start] = self._pixels(i)
        return found

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)

    def _open(self, i: int) -> tuple[Any, int, int]:
        """Return image ``i`` in the table's mode, its height and its width."""
        with needs("images", "a folder of images"):
            from PIL import Image
        path = self._files[i][0]
        try:
            with Image.open(path) as image:  # Pillow refuses a file whose header promises far too many pixels
                converted = image.convert(self._mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from error
        return converted, converted.height, converted.width

    def _pixels(self, i: int) -> NDArray[np.uint8]:
        """Return image ``i``, (channels, height, width). Raises DataError if its size differs and must not."""
        image, height, width = self._open(i)
        if (height, width) != self._size:
            if not self._resize:
                raise DataError(
                    f"{self._files[i][0]}: got {height}×{width} pixels, wanted {self._size[0]}×{self._size[1]} "
                    "like the first image; pass size=(height, width) to resize all images"
                )
            image = image.resize((self._size[1], self._size[0]))
        pixels = np.asarray(image, np.uint8)
        return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _height_and_width(size: Any) -> tuple[int, int]:
    pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not pair or not all(type(n) is int and 0 < n <= _LARGEST for n in size):
        raise DataError(f"images: got size {str(size)[:80]}, wanted [height, width], each from 1 to {_LARGEST:,}")
    return size[0], size[1]

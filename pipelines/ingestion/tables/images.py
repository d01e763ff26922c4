"""Folders of images, one folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.extras import needs
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import even_blocks

_LARGEST = 16_384
_MOST_PIXELS = 1 << 26
"""Pixels of the largest image that is decoded: 200 MB in colour."""
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
        self._size: tuple[int, int] | None = _height_and_width(size) if size is not None else None
        height, width = self._size = self._size or self._open(0)[1:]
        self.length = len(self._files)
        channels = 3 if mode == "RGB" else 1
        self.columns = {
            "image": Column((channels, height, width), np.dtype("u1")),
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
                with Image.open(path) as image:  # nothing is decoded before the size is known
                    self._check_size(path, image.height, image.width)
                    converted = image.convert(self._mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from error
        return converted, converted.height, converted.width

    def _check_size(self, path: str, height: int, width: int) -> None:
        """Raise DataError if an image is too large to be decoded, or differs in size and must not."""
        if height * width > _MOST_PIXELS:
            raise DataError(f"{path}: got {height}×{width} pixels, wanted at most {_MOST_PIXELS:,}; is it an image?")
        if self._size is not None and (height, width) != self._size and not self._resize:
            raise DataError(
                f"{path}: got {height}×{width} pixels, wanted {self._size[0]}×{self._size[1]} "
                "like the first image; pass size=(height, width) to resize all images"
            )

    def _pixels(self, i: int) -> NDArray[np.uint8]:
        """Return image ``i``, (channels, height, width)."""
        image, height, width = self._open(i)
        if (height, width) != self._size:
            assert self._size is not None
            image = image.resize(self._size[::-1])
        pixels = np.asarray(image, np.uint8)
        return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _height_and_width(size: Any) -> tuple[int, int]:
    pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not pair or not all(type(n) is int and 0 < n <= _LARGEST for n in size):
        raise DataError(f"images: got size {str(size)[:80]}, wanted [height, width], each from 1 to {_LARGEST:,}")
    return size[0], size[1]

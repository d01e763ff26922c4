"""Copies of tensors on the host, in buffers that are used again."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from dask_isgd.runtime import codec


class Snapshots:
    """Copies of tensors in buffers that are used again once nobody holds them.

    Fresh memory for every publication costs more than the copy (page faults). Dask hands the very
    tensors on, so a buffer is free only when each tensor of its former copy has been dropped.
    """

    def __init__(self) -> None:
        self._pool: list[tuple[dict[str, Tensor], list[weakref.ref[Tensor]]]] = []

    def take(self, tensors: Mapping[str, Tensor], dtype: str | None = None) -> dict[str, Tensor]:
        """A plain dict of contiguous copies on the host, floats as ``dtype`` if given, packed for Dask (``codec``)."""
        kind = {name: (t.shape, codec.dtype_of(t, dtype)) for name, t in tensors.items()}
        for index, (buffers, held) in enumerate(self._pool):
            same = kind == {name: (b.shape, b.dtype) for name, b in buffers.items()}
            if same and all(ref() is None for ref in held):
                del self._pool[index]
                break
        else:
            buffers = {name: torch.empty(shape, dtype=of, device="cpu") for name, (shape, of) in kind.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                buffers[name].copy_(tensor)
        # views, so that their end can be seen while the buffers live on
        views = codec.pack(buffers)
        self._pool.append((buffers, [weakref.ref(view) for view in views.values()]))
        del self._pool[:-4]
        return views

"""Copies of tensors on the host, in buffers that are reused."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dask_isgd.runtime import codec

Views = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def plain_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a view of each tensor under the same name."""
    return {name: tensor.view(tensor.shape) for name, tensor in tensors.items()}


class Snapshots:
    """Copies of tensors in buffers that are reused once nobody holds them.

    Fresh memory for every publication costs more than the copy (page faults). Dask hands on the very
    tensors that it was given, so a buffer is free only once each tensor of its former copy has been
    dropped. ``views`` makes these tensors from the buffers: ``codec.pack`` if Dask must carry them.
    """

    def __init__(self, views: Views = plain_views) -> None:
        self._views = views
        self._pool: list[tuple[dict[str, Tensor], list[weakref.ref[Tensor]]]] = []

    def take(self, tensors: Mapping[str, Tensor], dtype: str | None = None) -> dict[str, Tensor]:
        """Return a plain dict of contiguous copies on the host, with floats converted to ``dtype`` if it is given."""
        kinds = {name: (t.shape, codec.dtype_of(t, dtype)) for name, t in tensors.items()}
        for index, (buffers, held) in enumerate(self._pool):
            same = kinds == {name: (b.shape, b.dtype) for name, b in buffers.items()}
            if same and all(ref() is None for ref in held):
                del self._pool[index]
                break
        else:
            buffers = {name: torch.empty(shape, dtype=kind, device="cpu") for name, (shape, kind) in kinds.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                buffers[name].copy_(tensor)
        # Views, so that their deletion can be noticed while the buffers live on.
        views = self._views(buffers)
        self._pool.append((buffers, [weakref.ref(view) for view in views.values()]))
        del self._pool[:-4]
        return views

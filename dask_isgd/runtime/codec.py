"""Parameters as they are sent to the scorers: in half the bytes if configured, in dtypes that Dask can send.

Dask cannot send a bfloat16 tensor: a task that needs it never ends (distributed 2026.8). It is sent
as int16 with the same bits, and its name is marked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_MARK = ":bfloat16"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes in which parameters can be published; the gradient stays unbiased however coarse the scores are."""


def dtype_of(tensor: Tensor, dtype: str | None) -> torch.dtype:
    """Return the dtype in which a tensor is published: floats as ``dtype`` if given, everything else in its own."""
    return DTYPES[dtype] if dtype is not None and tensor.is_floating_point() else tensor.dtype


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of the tensors in dtypes that Dask can send.

    >>> list(pack({"weight": torch.zeros(2, dtype=torch.bfloat16), "bias": torch.zeros(2)}))
    ['weight:bfloat16', 'bias']
    """
    return {
        name + _MARK * (tensor.dtype is torch.bfloat16): (
            tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor.view(tensor.shape)
        )
        for name, tensor in tensors.items()
    }


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what :func:`pack` was given, without a copy."""
    return {
        name.removesuffix(_MARK): tensor.view(torch.bfloat16) if name.endswith(_MARK) else tensor
        for name, tensor in tensors.items()
    }

"""Parameters on their way to the scorers: in half the bytes if asked, in dtypes that Dask carries.

A bfloat16 tensor cannot be sent as it is: whoever asks for it waits for ever (distributed 2026.8). It
travels as int16, the same bits, and its name says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_MARK = ":bfloat16"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What parameters can be published in; any score leaves the gradient unbiased, a coarse one too."""


def dtype_of(tensor: Tensor, wanted: str | None) -> torch.dtype:
    """The dtype a tensor is published in: floats in the one that is wanted, if any, all else in its own."""
    return DTYPES[wanted] if wanted is not None and tensor.is_floating_point() else tensor.dtype


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views that Dask carries out of band.

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
    """What :func:`pack` was given, without a copy."""
    return {
        name.removesuffix(_MARK): tensor.view(torch.bfloat16) if name.endswith(_MARK) else tensor
        for name, tensor in tensors.items()
    }

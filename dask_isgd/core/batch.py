"""Conversion of a dataset's rows to tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dask_isgd.storage import Dataset

Array = NDArray[Any] | Tensor


class Prepare:
    """Turns rows of a dataset into tensors on a device, normalised there.

    Floats become float32; integer targets int64. An input with a normalisation becomes
    ``(x - mean) / std`` in float32, any other integer input stays as it is (tokens).
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        constants = dataset.normalisation or {}
        self.device = device
        self._constants = [
            tuple(torch.as_tensor(np.asarray(c, np.float32)).to(device) for c in constants[name])
            if name in constants
            else None
            for name in dataset.input_names
        ]

    def __call__(self, inputs: Sequence[Array], target: Array) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(map(self._input, inputs, self._constants)), self._target(target)

    def _input(self, array: Array, constants: tuple[Tensor, ...] | None) -> Tensor:
        tensor = as_tensor(array).to(self.device, non_blocking=True)
        if constants is not None:
            mean, std = constants
            return tensor.to(torch.float32, copy=True).sub_(mean).div_(std)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def _target(self, array: Array) -> Tensor:
        tensor = as_tensor(array).to(self.device, non_blocking=True)
        return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def as_tensor(array: Array) -> Tensor:
    """Return ``array`` as a tensor of a dtype that torch computes with; it shares the memory if possible."""
    if isinstance(array, Tensor):
        return array
    if array.dtype in (np.uint16, np.uint32, np.uint64):  # torch supports little arithmetic on these
        array = array.astype(np.int64)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array)
    return torch.from_numpy(array)

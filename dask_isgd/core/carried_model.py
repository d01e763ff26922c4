"""A module that exists already, as a model source: its structure travels with a task, its tensors do not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.core import models


class CarriedModel:
    """Builds a copy of ``module`` whose parameters and buffers have yet to be loaded; small when pickled."""

    def __init__(self, module: nn.Module) -> None:
        self._structure = _copy(module, "meta")
        self.__qualname__ = type(module).__qualname__

    def __call__(self) -> nn.Module:
        return _copy(self._structure, "cpu")


def _copy(module: nn.Module, device: str) -> nn.Module:
    """Return a copy with an empty tensor on ``device`` in the place of each of its state; tied ones stay tied."""
    empty: dict[int, Any] = {id(tensor): _empty(tensor, device) for tensor in models.state_of(module).values()}
    return copy.deepcopy(module, empty)


def _empty(tensor: Tensor, device: str) -> Tensor:
    new = torch.empty_like(tensor, device=device)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

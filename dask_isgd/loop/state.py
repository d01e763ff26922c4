"""A sampler's state as tensors and plain values, and back: what torch loads with ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensors_of(state: Any) -> Any:
    """Return ``state`` with tensors in the place of its numpy arrays, which share their memory."""
    return _mapped(state, lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def arrays_of(state: Any) -> Any:
    """Return ``state`` with numpy arrays in the place of its tensors, wherever these are."""
    return _mapped(state, lambda value: value.cpu().numpy() if isinstance(value, Tensor) else value)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(each, function) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, function) for each in value)
    return function(value)

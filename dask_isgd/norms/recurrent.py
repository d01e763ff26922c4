"""Recurrent layers, run step by step by operations that autograd's graph shows.

oneDNN and cuDNN run a recurrent layer as one node, which has no gradients of single steps. Without them torch composes
the layer of matrix products, whose gradients a reader of the graph reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def composed_recurrence(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers run without the libraries inside; all other layers run as ever."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    before: list[bool] = []

    # Past torch.backends, whose attributes torch.backends.disable_global_flags() freezes.
    def off(*_: Any) -> None:
        before[:] = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)

    def on(*_: Any) -> None:
        if before:
            torch._C._set_mkldnn_enabled(before[0])
            torch._C._set_cudnn_enabled(before[1])
        before.clear()

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(off))
            handles.append(layer.register_forward_hook(on, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        on()

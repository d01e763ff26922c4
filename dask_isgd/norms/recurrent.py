"""Recurrent layers, run step by step by operations that autograd's graph shows.

oneDNN and cuDNN run a recurrent layer as one node, which has no gradients of single steps. Without them torch composes
the layer of matrix products, whose gradients a reader of the graph reads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_off: list[tuple[bool, bool]] = []
"""What was enabled when each of the layers that run now began: the flags belong to the process, and its threads share
them. The first of these is what the last one restores."""


@contextmanager
def composed_recurrence(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers run without the libraries inside; all other layers run as ever.

    A recurrent layer that another thread runs meanwhile is composed too.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    running: list[None] = []

    # Past torch.backends, whose attributes torch.backends.disable_global_flags() freezes.
    def begin(*_: Any) -> None:
        running.append(None)
        with _lock:
            _off.append((torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()))
            _enable(False, False)

    def end(*_: Any) -> None:
        if running:
            running.pop()
            with _lock:
                if len(_off) == 1:
                    _enable(*_off[0])
                del _off[-1]

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        while running:
            end()


def _enable(mkldnn: bool, cudnn: bool) -> None:
    torch._C._set_mkldnn_enabled(mkldnn)
    torch._C._set_cudnn_enabled(cudnn)

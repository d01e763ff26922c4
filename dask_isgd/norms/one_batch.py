"""The norms of one batch in one call, with the engine kept from the call before."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from dask_isgd.norms.engine import NormEngine
from dask_isgd.norms.tensor_trees import Loss


@dataclass
class _Kept:
    """The engine of a model, without model and loss: it must not keep them alive."""

    engine: NormEngine
    loss: weakref.ref[Any]
    options: tuple[Any, ...]


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def gradient_norms(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    *,
    method: str = "exact",
    train_mode: bool = False,
    micro_batch: int | None = None,
    ignore: Sequence[str] = (),
) -> Tensor:
    """Return ||∂L_n/∂θ||₂ of each example's own loss with respect to all trainable parameters: (B,) float32.

    ``loss(output, target)`` returns one loss per example, (B,). ``inputs`` is a tensor, a tuple
    (``model(*inputs)``) or a mapping (``model(**inputs)``). The other arguments are those of
    :class:`NormEngine`. The engine is kept while model and loss exist: the next batch needs no audit if it comes with
    the same model and the same loss (the same object: a lambda written in the call is another one each time).

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.zeros(2)
    >>> gradient_norms(model, lambda output, target: output[:, 0] - target, x, y)
    tensor([5., 2.])
    """
    options = (method, train_mode, micro_batch, tuple(ignore))
    kept = _KEPT.pop(model, None)  # taken out while in use: another thread makes an engine of its own
    if kept is not None and kept.options == options and kept.loss() == loss:
        engine = kept.engine
        engine.attach(model, loss)
    else:
        engine = NormEngine(model, loss, method=method, train_mode=train_mode, micro_batch=micro_batch, ignore=ignore)
    try:
        return engine(inputs, targets)[0]
    finally:
        try:
            reference = weakref.WeakMethod(loss) if isinstance(loss, MethodType) else weakref.ref(loss)
        except TypeError:  # an object without weak references
            pass
        else:
            engine.detach()
            _KEPT[model] = _Kept(engine, reference, options)

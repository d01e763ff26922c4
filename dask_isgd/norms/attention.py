"""nn.MultiheadAttention, opened: while the norms are taken, two Linear layers that the rules can see.

The module hands its weights to one function that no hook looks into. In its place, for as long as an engine runs the
model, goes one that computes the same with an ``nn.Linear`` in front and one behind, sharing the parameters.
Only self-attention is opened; the engine compares its losses with those of the model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional


class OpenAttention(nn.Module):
    """Shapes: B examples, T positions, E features, H heads."""

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        self._closed = (closed,)  # in a tuple, so that it is no submodule
        width = closed.embed_dim
        self.in_proj = nn.Linear(width, 3 * width, bias=closed.in_proj_bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = closed.in_proj_weight, closed.in_proj_bias
        self.out_proj = nn.Linear(width, width, bias=closed.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = closed.out_proj.weight, closed.out_proj.bias
        self.train(closed.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_closed"][0], name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        closed: nn.MultiheadAttention = self._closed[0]
        if query is not key or key is not value or query.ndim != 3 or query.is_nested:
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return closed(query, key, value, *options)  # type: ignore[no-any-return]
        x_BTE = query if closed.batch_first else query.transpose(0, 1)
        size, length, width = x_BTE.shape
        parts = self.in_proj(x_BTE).view(size, length, 3, closed.num_heads, closed.head_dim)
        q_BHTd, k_BHTd, v_BHTd = parts.permute(2, 0, 3, 1, 4)
        mask = _mask(attn_mask, key_padding_mask, size, closed.num_heads, x_BTE)
        weights: Tensor | None = None
        if need_weights:
            scores = q_BHTd @ k_BHTd.mT / closed.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = weights @ v_BHTd
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, mask)
        output = self.out_proj(mixed.transpose(1, 2).reshape(size, length, width))
        return output if closed.batch_first else output.transpose(0, 1), weights


def _mask(attn_mask: Tensor | None, padding: Tensor | None, size: int, heads: int, like: Tensor) -> Tensor | None:
    """Both masks as one to be added to the scores, (B or 1, H or 1, T or 1, T)."""
    total: Tensor | None = None
    for mask, shape in ((attn_mask, None), (padding, (size, 1, 1, -1))):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
        if shape is not None:
            mask = mask.view(shape)
        elif mask.ndim == 3:
            mask = mask.unflatten(0, (size, heads))  # type: ignore[no-untyped-call]
        else:
            mask = mask[None, None]
        total = mask if total is None else total + mask
    return total


class Attentions:
    """The attention layers of a model, to be opened and closed; the same ones each time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._open: WeakKeyDictionary[nn.Module, OpenAttention] = WeakKeyDictionary()

    @contextmanager
    def opened(self) -> Iterator[bool]:
        """Opened inside; whether there are any."""
        places = [
            (parent, key, child)
            for parent in list(self.model.modules())
            for key, child in parent._modules.items()
            if child is not None and _opens(child)
        ]
        try:
            for parent, key, child in places:
                assert isinstance(child, nn.MultiheadAttention)
                if child not in self._open:
                    self._open[child] = OpenAttention(child)
                parent._modules[key] = self._open[child].train(child.training)
            yield bool(places)
        finally:
            for parent, key, child in places:
                parent._modules[key] = child

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closed again inside :meth:`opened`."""
        places = [
            (parent, key, child)
            for parent in list(self.model.modules())
            for key, child in parent._modules.items()
            if isinstance(child, OpenAttention)
        ]
        try:
            for parent, key, child in places:
                parent._modules[key] = child._closed[0]
            yield
        finally:
            for parent, key, child in places:
                parent._modules[key] = child


def _opens(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module.training and module.dropout > 0)  # dropout would draw in another order
        and not (
            module._forward_hooks or module._forward_pre_hooks or module.out_proj._parameters.get("weight") is None
        )
    )

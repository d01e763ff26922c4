"""nn.MultiheadAttention, decomposed: while norms are computed, two Linear layers that have a rule.

The module passes its weights to one function, and no hook sees inside it. While an engine runs the model, a module that
computes the same takes its place, with an ``nn.Linear`` before and one after attention, sharing the parameters.
Only self-attention is decomposed; the engine compares the losses with those of the original model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional


class DecomposedAttention(nn.Module):
    """Shapes: B examples, T positions, E features, H heads."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is not a submodule
        width = original.embed_dim
        self.in_proj = nn.Linear(width, 3 * width, bias=original.in_proj_bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = nn.Linear(width, width, bias=original.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = original.out_proj.weight, original.out_proj.bias
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

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
        original: nn.MultiheadAttention = self._original[0]
        if query is not key or key is not value or query.ndim != 3 or query.is_nested:
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return original(query, key, value, *options)  # type: ignore[no-any-return]
        x_BTE = query if original.batch_first else query.transpose(0, 1)
        size, length, width = x_BTE.shape
        parts = self.in_proj(x_BTE).view(size, length, 3, original.num_heads, original.head_dim)
        q_BHTd, k_BHTd, v_BHTd = parts.permute(2, 0, 3, 1, 4)
        mask = _mask(attn_mask, key_padding_mask, size, original.num_heads, x_BTE)
        weights: Tensor | None = None
        if need_weights:
            scores = q_BHTd @ k_BHTd.mT / original.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = weights @ v_BHTd
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, mask)
        output = self.out_proj(mixed.transpose(1, 2).reshape(size, length, width))
        return output if original.batch_first else output.transpose(0, 1), weights


def _mask(attn_mask: Tensor | None, padding: Tensor | None, size: int, heads: int, like: Tensor) -> Tensor | None:
    """Return both masks as one to add to the scores, (B or 1, H or 1, T or 1, T)."""
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


class AttentionLayers:
    """Attention layers, decomposed and restored; the decomposed modules are reused."""

    def __init__(self) -> None:
        self._decomposed: WeakKeyDictionary[nn.Module, DecomposedAttention] = WeakKeyDictionary()

    @contextmanager
    def decomposed(self, model: nn.Module) -> Iterator[bool]:
        """Decompose the layers of the model inside; yield whether there are any."""
        places = [
            (parent, key, child)
            for parent in list(model.modules())
            for key, child in parent._modules.items()
            if child is not None and _decomposable(child)
        ]
        try:
            for parent, key, child in places:
                assert isinstance(child, nn.MultiheadAttention)
                if child not in self._decomposed:
                    self._decomposed[child] = DecomposedAttention(child)
                parent._modules[key] = self._decomposed[child].train(child.training)
            yield bool(places)
        finally:
            for parent, key, child in places:
                parent._modules[key] = child

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Restore the original layers inside :meth:`decomposed`."""
        places = [
            (parent, key, child)
            for parent in list(model.modules())
            for key, child in parent._modules.items()
            if isinstance(child, DecomposedAttention)
        ]
        try:
            for parent, key, child in places:
                parent._modules[key] = child._original[0]
            yield
        finally:
            for parent, key, child in places:
                parent._modules[key] = child


def _decomposable(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module.training and module.dropout > 0)  # dropout would draw its masks in another order
        and not (
            module._forward_hooks or module._forward_pre_hooks or module.out_proj._parameters.get("weight") is None
        )
    )

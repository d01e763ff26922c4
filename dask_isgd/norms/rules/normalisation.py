"""Normalisation layers, y = w ∘ x̂ + b: the gradients are Σ d ∘ x̂ and Σ d over the positions of an example.

x̂ is recomputed when the gradient arrives: a cheap forward pass instead of another activation in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.norms.rules import Saved, register_rule
from dask_isgd.norms.tensor_trees import row_norms


class NormalisationRule(ABC):
    """Channels second: (B, C, ...)."""

    parameters = frozenset({"weight", "bias"})

    @abstractmethod
    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """Return x̂, in the shape of x."""

    def save(self, module: Any, x: Tensor, unshared: frozenset[str], shared: frozenset[str]) -> Saved:
        return (x,) if "weight" in unshared | shared else ()

    def norms(self, module: Any, saved: Saved, grad: Tensor, names: frozenset[str]) -> Tensor:
        gradients = [self.gradient(module, saved, grad, name) for name in names]
        return row_norms(gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1))

    def gradient(self, module: Any, saved: Saved, grad: Tensor, name: str) -> Tensor:
        if name == "weight":
            grad = self.normalised(module, saved[0].to(grad.dtype)).mul_(grad)
        return self.over_positions(module, grad)

    def over_positions(self, module: Any, grad: Tensor) -> Tensor:
        """Sum over the positions: (B, C, ...) -> (B, C)."""
        return grad.flatten(2).sum(2) if grad.ndim > 2 else grad


@register_rule(nn.GroupNorm)
class GroupNormRule(NormalisationRule):
    def normalised(self, module: nn.GroupNorm, x: Tensor) -> Tensor:
        return functional.group_norm(x, module.num_groups, eps=module.eps)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(NormalisationRule):
    """Normalises by the example's own statistics, or by the running ones in eval mode if the module tracks them."""

    def normalised(self, module: nn.modules.batchnorm._NormBase, x: Tensor) -> Tensor:
        own = module.training or not module.track_running_stats
        mean, var = (None, None) if own else (module.running_mean, module.running_var)
        return functional.instance_norm(x, mean, var, use_input_stats=own, eps=module.eps)


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(NormalisationRule):
    """Normalises by the running statistics, in eval mode; train mode couples examples, and the engine refuses it."""

    def normalised(self, module: nn.modules.batchnorm._NormBase, x: Tensor) -> Tensor:
        return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


@register_rule(nn.LayerNorm)
class LayerNormRule(NormalisationRule):
    """Channels last: (B, ..., *normalized_shape)."""

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)

    def over_positions(self, module: Any, grad: Tensor) -> Tensor:
        last = len(module.normalized_shape)
        return grad.flatten(1, -last - 1).sum(1) if grad.ndim > last + 1 else grad


@register_rule(nn.RMSNorm)
class RMSNormRule(LayerNormRule):
    parameters = frozenset({"weight"})

    def normalised(self, module: nn.RMSNorm, x: Tensor) -> Tensor:
        return functional.rms_norm(x, module.normalized_shape, eps=module.eps)

"""Averages what ranks have learned from steps of their own, every so many steps: local SGD, and DiLoCo's outer step.

Between two averages a rank moves along the gradient of its own share alone, and nothing travels (Stich, Local SGD,
arXiv 1805.09767). Averaged are parameters, buffers and the state of the optimizer, so that after an average all ranks
are in one state, that of a checkpoint. ``outer_momentum`` and ``outer_rate`` treat the change of the mean as the
gradient of an outer step with Nesterov momentum (Douillard et al., DiLoCo, arXiv 2311.08105, which has 0.9 and 0.7).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dask_isgd.learner.gradient_sum import GroupLostError

_AVERAGED = ("model.", "optimizer.", "clipping.")
_PREFIX = "outer."


class Averaging:
    """Averages every ``every`` steps, and after step ``last``; the outer step is one of ``momentum`` and ``rate``."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, every: int, last: int, momentum: float, rate: float
    ) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._every, self._last, self._momentum, self._rate = every, last, momentum, rate
        outer = momentum != 0.0 or rate != 1.0
        self._velocity = [torch.zeros_like(p) for p in self._parameters] if outer else []
        self.waited = 0.0
        """Seconds that averages took, of all steps."""
        self._anchor: list[Tensor] = []
        """The parameters after the last outer step."""

    def begin(self) -> None:
        """Start from the parameters as they are, the same on all ranks."""
        self._anchor = [p.clone() for p in self._parameters] if self._velocity else []

    def is_due(self, made: int) -> bool:
        """Whether ranks average once they have made so many steps."""
        return made % self._every == 0 or made == self._last

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Average these tensors of all ranks in place. Raises GroupLostError, and then has changed nothing."""
        began, device = time.perf_counter(), self._parameters[0].device
        kept = {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith(_AVERAGED) and tensor.device == device and tensor.is_floating_point()
        }
        try:
            if not _same_everywhere(kept, device):  # a parameter that not every rank has reached has no momentum there
                kept = {name: tensor for name, tensor in kept.items() if name.startswith("model.")}
            flat = torch.cat([tensor.detach().reshape(-1).to(_widest(kept)) for tensor in kept.values()])
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise GroupLostError(f"the parameters of another rank did not arrive: {error}") from error
        flat /= dist.get_world_size()
        parts = flat.split_with_sizes([tensor.numel() for tensor in kept.values()])
        for tensor, part in zip(kept.values(), parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))
        if self._velocity:
            self._step()
        self.waited += time.perf_counter() - began

    def _step(self) -> None:
        for parameter, anchor, velocity in zip(self._parameters, self._anchor, self._velocity, strict=True):
            change = parameter - anchor
            velocity.mul_(self._momentum).add_(change)
            anchor.add_(change.add_(velocity, alpha=self._momentum), alpha=self._rate)
            parameter.copy_(anchor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the momentum of the outer steps by flat names."""
        return {f"{_PREFIX}{i}": velocity for i, velocity in enumerate(self._velocity)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``tensors()``; without them, from a momentum of 0."""
        for i, velocity in enumerate(self._velocity):
            saved = tensors.get(f"{_PREFIX}{i}")
            velocity.zero_() if saved is None else velocity.copy_(saved)


def _widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32


def _same_everywhere(tensors: Mapping[str, Tensor], device: torch.device) -> bool:
    """Whether the tensors of all ranks have the same names and sizes."""
    text = repr([(name, tuple(tensor.shape)) for name, tensor in tensors.items()]).encode()
    number = int.from_bytes(blake2b(text, digest_size=7).digest(), "little")
    both = torch.tensor([number, -number], device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, smallest = both.tolist()
    return bool(largest == -smallest)

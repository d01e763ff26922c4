"""The sum of gradients over the ranks of a process group, bucket by bucket, while the backward pass continues.

Hooks of the parameters, not a wrapper around the model: captures of norms, the audit of the model and the names in
checkpoints are those of a single learner. A sum, not a mean: with factors c/M, M the global minibatch, it is exact for
shares of any size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dask_isgd.errors import ModelError

BUCKET_BYTES = 4 * 2**20
"""Bytes of gradients that are sent at once: the sooner the first bucket is full, the more of the rest is hidden."""


class GroupLostError(RuntimeError):
    """Another rank of the process group died, left or hangs."""


class Total(NamedTuple):
    """Sums over the ranks, 0-d tensors on the parameters' device."""

    loss: Tensor
    squares: Tensor
    """Of the squared norms of the ranks' own gradients; 0 unless they were asked for."""


class _Bucket:
    """Gradients of consecutive parameters of one dtype, in one piece of memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        self.views: list[Tensor] = []
        for parameter in parameters:
            start = sum(view.numel() for view in self.views)
            self.views.append(self.flat.as_strided(parameter.size(), parameter.stride(), start))
        self.left: set[nn.Parameter] = set()
        self.work: Any = None


class GradientSum:
    """Sums the gradients of ``parameters``, which are on one device, over the ranks of the default process group.

    Between :meth:`begin` and :meth:`finish` there is one backward pass. All ranks make the same steps. Raises
    GroupLostError if a sum does not arrive within the timeout of the group.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets = [_Bucket(each) for each in _parts(parameters, bucket_bytes)]
        self._places = {
            parameter: (bucket, view)
            for bucket in self._buckets
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True)
        }
        self._order = {parameter: number for number, parameter in enumerate(self._places)}
        exact = any(p.dtype == torch.float64 for p in parameters)
        self._tail = parameters[0].new_zeros(2 + len(parameters), dtype=torch.float64 if exact else torch.float32)
        """Loss, squares, and for each parameter how many ranks have a gradient of it."""
        self._next, self._active, self._measures = 0, False, False
        self.waited = 0.0
        """Seconds in which this process waited for sums, of all steps; on CUDA, where the device waits, about 0."""
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters]  # type: ignore[no-untyped-call]

    def begin(self, *, squares: bool = False) -> None:
        """Expect the gradients of the next backward pass; ``squares``: sum their squared norms, too."""
        for bucket in self._buckets:
            bucket.left, bucket.work = set(bucket.parameters), None
        self._tail.fill_(1.0)
        self._tail[:2] = 0.0
        self._next, self._active, self._measures = 0, True, squares

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._active or parameter.grad is None:
            return
        bucket, view = self._places[parameter]
        if bucket.work is not None:
            raise ModelError(
                "Learning.learners: a parameter got a second gradient in one backward pass, after the first was sent "
                "to the other ranks; call checkpoint with use_reentrant=False, or train with one learner"
            )
        view.copy_(parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
        bucket.left.discard(parameter)
        # in the same order on all ranks, whatever the order in which gradients arrive
        while self._next < len(self._buckets) and not self._buckets[self._next].left:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: _Bucket) -> None:
        if self._measures:
            self._tail[1] += torch.dot(bucket.flat, bucket.flat)
        bucket.work = _launched(bucket.flat)

    def finish(self, loss: Tensor) -> Total:
        """Give each parameter its summed gradient, and return the sum of ``loss`` (0-d) over the ranks.

        A parameter without a gradient on every rank is left without one.
        """
        self._active = False
        missing = [parameter for bucket in self._buckets for parameter in bucket.parameters if parameter in bucket.left]
        for parameter in missing:
            self._places[parameter][1].zero_()
            self._tail[2 + self._order[parameter]] = 0.0
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        self._tail[0] = loss
        works = [bucket.work for bucket in self._buckets] + [_launched(self._tail)]
        began = time.perf_counter()
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise GroupLostError(f"the gradients of another rank did not arrive: {error}") from error
        self.waited += time.perf_counter() - began
        for parameter, (_, view) in self._places.items():
            parameter.grad = view
        if missing:  # otherwise nothing waits for the device
            ranks = self._tail[2:].tolist()
            for parameter in missing:
                if ranks[self._order[parameter]] == 0.0:
                    parameter.grad = None
        loss, squares = self._tail[:2].clone()
        return Total(loss, squares)

    def close(self) -> None:
        """Leave the parameters alone."""
        while self._handles:
            self._handles.pop().remove()


def _launched(tensor: Tensor) -> Any:
    try:
        return dist.all_reduce(tensor, async_op=True)
    except RuntimeError as error:
        raise GroupLostError(f"gradients cannot be sent to the other ranks: {error}") from error


def _parts(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Yield parameters in the order in which a backward pass usually reaches them, in parts of about ``most`` bytes."""
    part: list[nn.Parameter] = []
    size = 0
    for parameter in reversed(parameters):
        if part and (size >= most or parameter.dtype != part[0].dtype):
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.numel() * parameter.element_size()
    yield part

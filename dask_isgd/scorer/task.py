"""The short tasks: score one chunk, evaluate one part of the validation data.

Both take the parameters of one published version, a flat dict of tensors that Dask brought here
and that the next task of this worker shares: it is copied into a model of this thread's own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import CorruptChunkError
from dask_isgd.norms import NormEngine, checked_losses
from dask_isgd.runtime import codec, torch_threads
from dask_isgd.sampling.bad_norms import check_norms
from dask_isgd.scorer.adaptive_batch import AdaptiveBatch
from dask_isgd.scorer.chunk_reader import shared_reader
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)

_RUNS = 4
"""Models a thread keeps where several runs share the scorers: to build one costs more than a task."""
_local = threading.local()


@dataclass(frozen=True)
class ScoreReport:
    """What a scoring task tells the coordinator."""

    chunk: int
    incarnation: int
    version: int
    examples: int
    seconds: float
    loss: float
    """Sum of the examples' losses."""
    bad: int
    """Norms that were NaN, infinite or negative; those examples keep their former weight."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over a part of the validation data."""

    examples: int
    loss: float
    wrong: float
    """Examples whose highest output is not their target; NaN where targets are no classes."""

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.examples + other.examples, self.loss + other.loss, self.wrong + other.wrong)


class _Local:
    """A run in one thread: its model, the version that holds, the norm engine, the batch that fits, the weights."""

    def __init__(self, spec: RunSpec) -> None:
        self.device = models.device_of(spec.learning.device)
        self.model: nn.Module = models.build(spec.model).to(self.device)
        self.loss = spec.loss_function
        self.engine = NormEngine(self.model, self.loss, method=spec.scoring.method, train_mode=spec.scoring.train_mode)
        self.prepare = Prepare(spec.data, self.device)
        self.fitting = AdaptiveBatch(spec.scoring.batch_size, fixed=spec.learning.synchronous)
        self.held: tuple[int, int] | None = None
        self.spec = spec
        """The first this thread was given: its datasets are open, those of each task's own copy are not."""

    @cached_property
    def weights(self) -> WeightArray:
        """Opened once: that takes longer than to write a chunk."""
        return self.spec.directory.open_weights()

    def norms(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Norms and losses of a batch, each (B,)."""
        norms_B, losses_B = self.engine(inputs if len(inputs) > 1 else inputs[0], targets)
        return norms_B, losses_B

    def outputs(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and wrongness (NaN where targets are no classes) of a batch, each (B,)."""
        with torch.no_grad():
            output = self.model(*inputs)
            return checked_losses(self.loss, output, targets, len(targets)), _wrong(output, targets)

    def hold(self, tensors: dict[str, Tensor], incarnation: int, version: int) -> None:
        if self.held != (incarnation, version):
            models.load(self.model, codec.unpack(tensors))
            self.held = (incarnation, version)


def _model_for(spec: RunSpec, tensors: dict[str, Tensor], incarnation: int, version: int) -> _Local:
    held: dict[tuple[str, int], _Local] = _local.__dict__.setdefault("models", {})
    key = spec.run, spec.attempt  # a resumed run may have other settings
    local = held.pop(key, None) or _Local(spec)
    while len(held) >= _RUNS:
        del held[next(iter(held))]  # the one unused for longest
    held[key] = local
    local.hold(tensors, incarnation, version)
    return local


def score(tensors: dict[str, Tensor], spec: RunSpec, chunk: int, incarnation: int, version: int) -> ScoreReport:
    """Score one scoring chunk with one version of the parameters and write its weights whole.

    Raises NonFiniteNormsError if more than one norm in a hundred is bad, a DataError for a chunk
    that is missing or corrupt, OSError if the weights cannot be written, LeaseLostError where the
    run is exact and its learner has a successor.
    """
    began = time.perf_counter()
    torch_threads.scorer(spec.scoring.threads)
    local = _model_for(spec, tensors, incarnation, version)
    spec = local.spec
    start, stop = chunk * spec.chunk, min(spec.examples, (chunk + 1) * spec.chunk)
    norms = np.empty(stop - start, np.float32)
    loss, first = 0.0, 0
    scan = shared_reader(spec.scoring.cache_memory_bytes)
    for rows in scan.batches(spec.data, start, stop, spec.scoring.batch_size, tag=spec.run):
        inputs, targets = local.prepare(rows.inputs, rows.target)
        norms_B, losses_B = local.fitting(local.norms, inputs, targets)
        norms[first : first + len(targets)] = norms_B.cpu().numpy()
        first += len(targets)
        loss += float(losses_B.double().sum())
    bad = _keep_former(norms, local.weights, chunk, start, strict=spec.learning.synchronous)
    if spec.learning.synchronous:  # a straggler's weights are as good as any elsewhere
        spec.directory.leases("learner").check(incarnation)
    local.weights.write(chunk, norms)
    return ScoreReport(chunk, incarnation, version, stop - start, time.perf_counter() - began, loss, bad)


def _keep_former(norms: NDArray[np.float32], weights: WeightArray, chunk: int, start: int, *, strict: bool) -> int:
    """Put the former weights, NaN where those are damaged and not ``strict``, in the place of bad norms; how many."""
    bad = np.flatnonzero(check_norms(norms, f"chunk {chunk}", start))
    if len(bad):
        try:
            norms[bad] = weights.read(chunk)[bad]
        except CorruptChunkError as error:
            if strict:
                raise
            logger.warning("%s; its %d bad norms count as never scored", error, len(bad))
            norms[bad] = np.nan
    return len(bad)


def evaluate(
    tensors: dict[str, Tensor], spec: RunSpec, start: int, stop: int, incarnation: int, version: int
) -> Evaluation:
    """Loss and errors of one version on rows ``start`` to ``stop`` of the validation data."""
    torch_threads.scorer(spec.scoring.threads)
    local = _model_for(spec, tensors, incarnation, version)
    spec = local.spec
    assert spec.validation is not None
    training = local.model.training
    local.model.eval()
    total = Evaluation(0, 0.0, 0.0)
    try:
        scan = shared_reader(spec.scoring.cache_memory_bytes)
        for rows in scan.batches(spec.validation, start, stop, spec.scoring.batch_size, tag=spec.run):
            inputs, targets = local.prepare(rows.inputs, rows.target)
            losses_B, wrong_B = local.fitting(local.outputs, inputs, targets)
            total += Evaluation(len(targets), float(losses_B.double().sum()), float(wrong_B.double().sum()))
    finally:
        local.model.train(training)
    return total


def _wrong(output: object, targets: Tensor) -> Tensor:
    classes = isinstance(output, Tensor) and output.ndim == 2 and targets.ndim == 1
    if not classes or targets.is_floating_point():
        return torch.full((len(targets),), math.nan)
    assert isinstance(output, Tensor)
    return (output.argmax(dim=1) != targets).float()

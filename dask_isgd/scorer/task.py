"""The short tasks: score one chunk, evaluate one part of the validation data.

Both take the parameters of one published version, a flat dict of tensors that Dask has transferred to
this worker. Its tasks share the dict, so each thread copies it into a model of its own.
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
from dask_isgd.order import Order
from dask_isgd.runtime import codec, torch_threads
from dask_isgd.runtime.allocator import keep_freed_memory
from dask_isgd.runtime.dask_internals import memory_limit
from dask_isgd.sampling.bad_norms import check_norms
from dask_isgd.scorer.adaptive_batch import AdaptiveBatch
from dask_isgd.scorer.chunk_reader import shared_reader
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)

_MOST_REPLICAS = 4
"""Replicas that a thread keeps if several runs share the scorers: to build one costs more than a task."""
_thread = threading.local()


@dataclass(frozen=True)
class ScoreReport:
    """The result of a scoring task."""

    chunk: int
    incarnation: int
    version: int
    examples: int
    seconds: float
    loss: float
    """Sum of the examples' losses."""
    bad: int
    """Number of norms that were NaN, infinite or negative; those examples keep their former weight."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over a part of the validation data."""

    examples: int
    loss: float
    wrong: float
    """Number of examples whose highest output is not their target; NaN if targets are not classes."""

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.examples + other.examples, self.loss + other.loss, self.wrong + other.wrong)


class _Replica:
    """What one thread keeps for a run: its model and the version loaded, norm engine, batch size, weights."""

    def __init__(self, spec: RunSpec) -> None:
        self.device = models.device_of(spec.learning.device)
        self.model: nn.Module = models.build(spec.model).to(self.device)
        self.loss = spec.loss_function
        self.engine = NormEngine(self.model, self.loss, method=spec.scoring.method, train_mode=spec.scoring.train_mode)
        self.prepare = Prepare(spec.data, self.device)
        self.adaptive_batch = AdaptiveBatch(spec.scoring.batch_size, fixed=spec.learning.synchronous)
        self.order: Order | None = None
        self.spec = spec
        """The first one of this thread: its datasets are open, unlike those of each task's own copy."""

    @cached_property
    def weights(self) -> WeightArray:
        """The weight array, opened once: that takes longer than to write a chunk."""
        return self.spec.directory.open_weights()

    def norms(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return norms and losses of a batch, each (B,)."""
        norms_B, losses_B = self.engine(inputs if len(inputs) > 1 else inputs[0], targets)
        return norms_B, losses_B

    def outputs(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and errors (0 or 1, NaN if targets are not classes) of a batch, each (B,)."""
        with torch.no_grad():
            output = self.model(*inputs)
            return checked_losses(self.loss, output, targets, len(targets)), _wrong(output, targets)

    def load(self, tensors: dict[str, Tensor], order: Order) -> None:
        """Load a version into the model unless it is there already."""
        if self.order != order:
            models.load(self.model, codec.unpack(tensors))
            self.order = order


def _replica_for(spec: RunSpec, tensors: dict[str, Tensor], incarnation: int, version: int) -> _Replica:
    """Return this thread's replica of a run, with a version loaded."""
    replicas: dict[tuple[str, int], _Replica] = _thread.__dict__.setdefault("replicas", {})
    key = spec.run, spec.attempt  # a resumed run may have other settings
    replica = replicas.pop(key, None) or _Replica(spec)
    while len(replicas) >= _MOST_REPLICAS:
        del replicas[next(iter(replicas))]  # the least recently used
    replicas[key] = replica
    replica.load(tensors, (incarnation, version))
    return replica


def score(tensors: dict[str, Tensor], spec: RunSpec, chunk: int, incarnation: int, version: int) -> ScoreReport:
    """Score one scoring chunk with one version of the parameters and write its weights as a whole.

    Raises NonFiniteNormsError if more than one norm in a hundred is bad, a DataError for a chunk
    that is missing or corrupt, OSError if the weights cannot be written, LeaseLostError if the
    run is synchronous and its learner has a successor.
    """
    began = time.perf_counter()
    keep_freed_memory(memory_limit())
    torch_threads.start_scorer(spec.scoring.threads)
    replica = _replica_for(spec, tensors, incarnation, version)
    spec = replica.spec
    start, stop = chunk * spec.chunk, min(spec.examples, (chunk + 1) * spec.chunk)
    norms = np.empty(stop - start, np.float32)
    loss, first = 0.0, 0
    reader = shared_reader(spec.scoring.cache_memory_bytes)
    for rows in reader.batches(spec.data, start, stop, spec.scoring.batch_size, tag=spec.run):
        inputs, targets = replica.prepare(rows.inputs, rows.target)
        norms_B, losses_B = replica.adaptive_batch(replica.norms, inputs, targets)
        norms[first : first + len(targets)] = norms_B.cpu().numpy()
        first += len(targets)
        loss += float(losses_B.double().sum())
    bad = _keep_former(norms, replica.weights, chunk, start, strict=spec.learning.synchronous)
    if spec.learning.synchronous:  # in other runs late weights are as good as any
        spec.directory.leases("learner").lease(incarnation).check()
    replica.weights.write(chunk, norms)
    return ScoreReport(chunk, incarnation, version, stop - start, time.perf_counter() - began, loss, bad)


def _keep_former(norms: NDArray[np.float32], weights: WeightArray, chunk: int, start: int, *, strict: bool) -> int:
    """Replace bad norms by the former weights, or NaN if those are corrupt and not ``strict``; return how many."""
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
    """Return loss and errors of one version on rows ``start`` to ``stop`` of the validation data."""
    torch_threads.start_scorer(spec.scoring.threads)
    replica = _replica_for(spec, tensors, incarnation, version)
    spec = replica.spec
    assert spec.validation is not None
    training = replica.model.training
    replica.model.eval()
    total = Evaluation(0, 0.0, 0.0)
    try:
        reader = shared_reader(spec.scoring.cache_memory_bytes)
        for rows in reader.batches(spec.validation, start, stop, spec.scoring.batch_size, tag=spec.run):
            inputs, targets = replica.prepare(rows.inputs, rows.target)
            losses_B, wrong_B = replica.adaptive_batch(replica.outputs, inputs, targets)
            total += Evaluation(len(targets), float(losses_B.double().sum()), float(wrong_B.double().sum()))
    finally:
        replica.model.train(training)
    return total


def _wrong(output: object, targets: Tensor) -> Tensor:
    classes = isinstance(output, Tensor) and output.ndim == 2 and targets.ndim == 1
    if not classes or targets.is_floating_point():
        return torch.full((len(targets),), math.nan)
    assert isinstance(output, Tensor)
    return (output.argmax(dim=1) != targets).float()

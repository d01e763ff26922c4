"""The short tasks: score one chunk, evaluate one part of the validation data.

Both take the parameters of one published version, a flat dict of tensors that Dask has transferred to
this worker. Its tasks share the dict, so each scoring thread copies it into a model of its own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.incomplete import complete_only, incomplete, replaced
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import CorruptChunkError, ModelError
from dask_isgd.norms import NormEngine, checked_losses
from dask_isgd.order import Order
from dask_isgd.runtime import codec, torch_threads
from dask_isgd.runtime.allocator import keep_freed_memory
from dask_isgd.runtime.dask_internals import forget_keys, memory_limit
from dask_isgd.sampling.bad_norms import check_norms
from dask_isgd.scorer.adaptive_batch import AdaptiveBatch
from dask_isgd.scorer.chunk_reader import begin, shared_reader
from dask_isgd.scorer.scoring_threads import compute_in_turn
from dask_isgd.storage import Dataset, OutputArray, Rows, WeightArray

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Key = tuple[str, int]
_MOST_RUNS = 4
"""Runs that are kept, if several share the scorers: to build a model costs more than a task."""
_thread = threading.local()
_lock = threading.Lock()
_open_runs: dict[_Key, _OpenRun] = {}


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


class _OpenRun:
    """What a process keeps of a run: its data and its weights stay open, unlike those of each task's own copy."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        """The first one of this process."""

    @cached_property
    def weights(self) -> WeightArray | OutputArray:
        """The weight array, opened once: that takes longer than to write a chunk."""
        return self.spec.open_weights()


class _Replica:
    """What one thread keeps for a run: its model and the version loaded, norm engine, batch size."""

    def __init__(self, spec: RunSpec) -> None:
        self.device = models.device_of(spec.learning.device)
        self.model: nn.Module = models.build(spec.model).to(self.device)
        self.loss = spec.loss_function
        scoring = spec.scoring
        self.engine = NormEngine(
            self.model, self.loss, method=scoring.method, train_mode=scoring.train_mode, ignore=scoring.ignore
        )
        self._prepare = Prepare(spec.data, self.device)
        self.adaptive_batch = AdaptiveBatch(spec.scoring.batch_size, fixed=spec.learning.synchronous)
        self.order: Order | None = None

    def prepare(self, rows: Rows) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return inputs and targets of a batch on the device.

        Inputs may share the memory of the cache: whatever calls the model gives it copies.
        """
        inputs, targets = self._prepare(*rows)
        return inputs, targets.clone()

    def norms(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return norms and losses of a batch, each (B,)."""
        norms_B, losses_B = self.engine(inputs if len(inputs) > 1 else inputs[0], targets)
        return norms_B, losses_B

    def outputs(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and errors (0 or 1, NaN if targets are not classes) of a batch, each (B,)."""
        with torch.no_grad():
            output = self._output(inputs)
            return checked_losses(self.loss, output, targets, len(targets)), _wrong(output, targets)

    def predictions(self, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor]:
        """Return the outputs of a batch, (B, ...) float32. Raises ModelError if they are anything else."""
        with torch.no_grad():
            output = self._output(inputs)
        return (one_output(output, len(targets)),)

    def _output(self, inputs: tuple[Tensor, ...]) -> object:
        return self.model(*map(torch.clone, inputs))  # it may work in place

    def load(self, tensors: dict[str, Tensor], order: Order) -> None:
        """Load a version into the model unless it is there already."""
        if self.order != order:
            models.load(self.model, codec.unpack(tensors))
            self.order = order


def _kept(runs: dict[_Key, _T], spec: RunSpec, make: Callable[[RunSpec], _T]) -> _T:
    """Return what ``runs`` holds for a run, made if it holds nothing; the least recently used run is dropped."""
    key = spec.run, spec.attempt  # a resumed run may have other settings
    found = runs.pop(key, None) or make(spec)
    while len(runs) >= _MOST_RUNS:
        del runs[next(iter(runs))]
    runs[key] = found
    return found


def _opened(spec: RunSpec) -> _OpenRun:
    with _lock:
        return _kept(_open_runs, spec, _OpenRun)


def _replica_for(spec: RunSpec, tensors: dict[str, Tensor], order: Order) -> _Replica:
    """Return this thread's replica of a run, with a version loaded."""
    replicas: dict[_Key, _Replica] = _thread.__dict__.setdefault("replicas", {})
    replica = _kept(replicas, spec, _Replica)
    replica.load(tensors, order)
    return replica


def score(tensors: dict[str, Tensor], spec: RunSpec, chunk: int, incarnation: int, version: int) -> ScoreReport:
    """Score one scoring chunk with one version of the parameters and write its weights as a whole.

    The tasks of a worker overlap: see :mod:`dask_isgd.scorer.scoring_threads`.
    Raises NonFiniteNormsError if more than one norm in a hundred is bad, a DataError for a chunk
    that is missing or corrupt, OSError if the weights cannot be written, LeaseLostError if the
    run is synchronous and its learner has a successor.
    """
    began = time.perf_counter()
    keep_freed_memory(memory_limit())
    forget_keys()
    run = _opened(spec)
    spec = run.spec
    start, stop = chunk * spec.chunk, min(spec.examples, (chunk + 1) * spec.chunk)
    batches = _read(run, spec.data, start, stop)
    read = time.perf_counter()
    compute = partial(_norms, run, tensors, (incarnation, version), batches, stop - start)
    norms, loss, seconds = compute_in_turn(compute, spec.scoring.resources)
    computed = time.perf_counter()
    bad = _keep_former(norms, run.weights, chunk, start, strict=spec.learning.synchronous)
    if spec.learning.synchronous:  # in other runs late weights are as good as any
        spec.directory.leases("learner").lease(incarnation).check()
    run.weights.write(chunk, norms)
    seconds += read - began + time.perf_counter() - computed  # without the time spent waiting for other tasks
    return ScoreReport(chunk, incarnation, version, stop - start, seconds, loss, bad)


def _norms(
    run: _OpenRun, tensors: dict[str, Tensor], order: Order, batches: Iterator[Rows], count: int
) -> tuple[NDArray[np.float32], float, float]:
    """Return the norms (count,) of the examples in ``batches``, the sum of their losses, and the seconds it took."""
    began = time.perf_counter()
    torch_threads.start_scorer(run.spec.scoring.threads)
    replica = _replica_for(run.spec, tensors, order)
    norms = np.empty(count, np.float32)
    loss, first = 0.0, 0
    for rows in batches:
        bad = incomplete(rows) if run.spec.scoring.skip_bad_chunks else np.zeros(len(rows.target), bool)
        inputs, targets = replica.prepare(replaced(rows, bad) if bad.any() else rows)
        norms_B, losses_B = replica.adaptive_batch(replica.norms, inputs, targets)
        norms[first : first + len(targets)] = np.where(bad, 0.0, norms_B.cpu().numpy())
        first += len(targets)
        loss += float(np.where(bad, 0.0, losses_B.double().cpu().numpy()).sum())
    return norms, loss, time.perf_counter() - began


def _read(run: _OpenRun, dataset: Dataset, start: int, stop: int) -> Iterator[Rows]:
    """Return the batches of a span, of which the first one has been read."""
    scoring = run.spec.scoring
    reader = shared_reader(scoring.cache_memory_bytes)
    return begin(reader.batches(dataset, start, stop, scoring.batch_size, tag=run.spec.run))


def _keep_former(
    norms: NDArray[np.float32], weights: WeightArray | OutputArray, chunk: int, start: int, *, strict: bool
) -> int:
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


def predict(tensors: dict[str, Tensor], spec: RunSpec, chunk: int, incarnation: int, version: int) -> ScoreReport:
    """Write the outputs of one version, in eval mode, for one scoring chunk as a whole; loss and bad are not known."""
    began = time.perf_counter()
    run = _opened(spec)
    start, stop = chunk * spec.chunk, min(spec.examples, (chunk + 1) * spec.chunk)
    batches = _read(run, spec.data, start, stop)
    compute = partial(_predictions, run, tensors, (incarnation, version), batches)
    run.weights.write(chunk, compute_in_turn(compute, spec.scoring.resources))
    return ScoreReport(chunk, incarnation, version, stop - start, time.perf_counter() - began, math.nan, 0)


def _predictions(
    run: _OpenRun, tensors: dict[str, Tensor], order: Order, batches: Iterator[Rows]
) -> NDArray[np.float32]:
    torch_threads.start_scorer(run.spec.scoring.threads)
    replica = _replica_for(run.spec, tensors, order)
    replica.model.eval()
    found = []
    for rows in batches:
        inputs, targets = replica.prepare(rows)
        found.append(replica.adaptive_batch(replica.predictions, inputs, targets)[0].cpu().numpy())
    return np.concatenate(found)


def one_output(output: object, size: int) -> Tensor:
    """Return a model's output as float32. Raises ModelError if it is not one tensor, (``size``, ...)."""
    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != size:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ModelError(f"model: got an output of {got} for {size} examples, wanted one tensor with the batch first")
    return output.float()


def evaluate(
    tensors: dict[str, Tensor], spec: RunSpec, start: int, stop: int, incarnation: int, version: int
) -> Evaluation:
    """Return loss and errors of one version on rows ``start`` to ``stop`` of the validation data."""
    run = _opened(spec)
    assert run.spec.validation is not None
    batches = _read(run, run.spec.validation, start, stop)
    return compute_in_turn(partial(_sums, run, tensors, (incarnation, version), batches), spec.scoring.resources)


def _sums(run: _OpenRun, tensors: dict[str, Tensor], order: Order, batches: Iterator[Rows]) -> Evaluation:
    torch_threads.start_scorer(run.spec.scoring.threads)
    replica = _replica_for(run.spec, tensors, order)
    training = replica.model.training
    replica.model.eval()
    total = Evaluation(0, 0.0, 0.0)
    try:
        for rows in batches:
            if run.spec.scoring.skip_bad_chunks:
                rows = complete_only(rows)
            if not len(rows.target):
                continue
            inputs, targets = replica.prepare(rows)
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

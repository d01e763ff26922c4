"""One pass of a trained model over a dataset: its examples' scores or outputs, by the scoring tasks of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distributed import Client, Future, KilledWorker
from torch import nn

from dask_isgd.checks.model import check_model, check_parameters
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.coordinator.in_flight import InFlightTasks
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.carried_model import CarriedModel
from dask_isgd.core.loss import Loss, cross_entropy, loss_of
from dask_isgd.core.spec import PassSpec
from dask_isgd.display.notebook import in_notebook
from dask_isgd.errors import RunMismatchError
from dask_isgd.runtime import codec
from dask_isgd.runtime.placement import ScorerPool
from dask_isgd.scorer import task as scoring_task
from dask_isgd.storage import Dataset, OutputArray

if TYPE_CHECKING:
    import xarray as xr

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the examples that are done and their total."""

_TASK_SECONDS = 1.0
_LEAST_CHUNKS = 8
_MARK_SECONDS = 1.0
_TRIES = 3
_POLL = 0.5
_PROBE_ROWS = 64
_ORDER = (1, 0)


def score(
    client: Client,
    model: nn.Module | models.ModelSource,
    data: Dataset | str | Path,
    url: str | Path,
    *,
    method: str = "exact",
    loss: Loss | str | None = None,
    scoring: Scoring | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.DataArray:
    """Write a score of every example to a Zarr group at ``url``, and return it: ``score`` (sample,) float32.

    ``method``: ``"exact"`` gradient norms, ``"bound"`` or ``"loss"``, as ``Scoring.method``, which it replaces. Large
    scores are hard examples, and often label errors. ``model``: a trained module, or what builds one. ``loss`` is as in
    ``fit``: a function of output and target that returns one loss per example, or a name; default: cross entropy.

    Neither data nor scores have to fit into memory: scoring tasks read and write chunk by chunk on the workers. If it
    is interrupted, the same call does what is left. A score that is not finite is NaN; if these are more than one in a
    hundred of a chunk, NonFiniteNormsError is raised. ``progress``: see ``Progress``; by default a bar in a terminal.

    Raises RunMismatchError if ``url`` holds the output of another model, dataset or method, unless ``overwrite``.
    """
    settings = dataclasses.replace(scoring or Scoring(), method=method)  # type: ignore[arg-type]
    dataset, module, source = _opened(data, model)
    known = loss_of(loss)
    speed, _ = check_model(module, known or cross_entropy, dataset, settings, classify=known is None)
    about = {"score": method, "train_mode": settings.train_mode}
    about |= {"ignore": list(settings.ignore)} if settings.ignore else {}
    one = _Pass(client, module, source, dataset, url, settings, known, storage_options, speed)
    return one.run("score", (len(dataset),), about, scoring_task.score, overwrite, progress)


def predict(
    client: Client,
    model: nn.Module | models.ModelSource,
    data: Dataset | str | Path,
    url: str | Path,
    *,
    scoring: Scoring | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.DataArray:
    """Write the model's output for every example to a Zarr group at ``url``: ``output`` (sample, ...) float32.

    The model runs in eval mode, and returns one tensor. Everything else is as in ``score``.
    """
    settings = scoring or Scoring()
    dataset, module, source = _opened(data, model)
    rows = dataset.read(0, min(_PROBE_ROWS, len(dataset)))
    inputs, targets = Prepare(dataset, torch.device("cpu"))(rows.inputs, rows.target)
    with torch.no_grad():
        module(*inputs)
        began = time.perf_counter()
        output = scoring_task.one_output(module(*inputs), len(targets))
    speed = len(targets) / max(time.perf_counter() - began, 1e-9)
    one = _Pass(client, module, source, dataset, url, settings, None, storage_options, speed)
    return one.run("output", (len(dataset), *output.shape[1:]), {}, scoring_task.predict, overwrite, progress)


def _opened(
    data: Dataset | str | Path, model: nn.Module | models.ModelSource
) -> tuple[Dataset, nn.Module, models.ModelSource]:
    dataset = data if isinstance(data, Dataset) else Dataset(str(data))
    dataset.check(classify=False)
    module = model if isinstance(model, nn.Module) else models.build(model)
    check_parameters(module)
    copied = CarriedModel(module)
    here = copied()
    models.load(here, {name: tensor.detach().cpu() for name, tensor in models.state_of(module).items()})
    return dataset, here.eval(), copied if isinstance(model, nn.Module) else model


class _Pass:
    """The chunks of one output: which are written, and the tasks that write the others."""

    def __init__(
        self,
        client: Client,
        module: nn.Module,
        source: models.ModelSource,
        dataset: Dataset,
        url: str | Path,
        scoring: Scoring,
        loss: Loss | None,
        storage_options: Mapping[str, Any] | None,
        speed: float,
    ) -> None:
        self._client, self._scoring, self._speed, self._dataset = client, scoring, speed, dataset
        self._tensors = codec.pack({name: tensor.detach() for name, tensor in models.state_of(module).items()})
        self._output = OutputArray(url, storage_options=storage_options)
        self._storage_options = dict(storage_options or {})
        self._source, self._loss = source, loss
        self._parameters: Future[Any] | None = None

    def run(
        self,
        name: str,
        shape: tuple[int, ...],
        about: Mapping[str, Any],
        task: Callable[..., scoring_task.ScoreReport],
        overwrite: bool,
        progress: Progress | None,
    ) -> xr.DataArray:
        """Write what is missing of the output, and return it."""
        import xarray

        wanted = {**about, "shape": list(shape), "data": self._dataset.fingerprint(), "model": self._digest()}
        if overwrite or not self._output.exists:
            self._output = OutputArray.create(
                self._output.url, name, shape, self._chunk_size(), wanted, storage_options=self._storage_options
            )
        self._require_same({**wanted, "name": name})
        spec = PassSpec(
            run=uuid.uuid4().hex[:10],
            url=self._output.url,
            model=self._source,
            data=self._dataset,
            validation=None,
            loss=self._loss,
            learning=Learning(steps=1),
            scoring=self._scoring,
            sampling=Sampling(),
            chunk=self._output.chunk_size,
            attempt=1,
            storage_options=self._storage_options,
        )
        with _shown(progress, name) as show:
            self._write(spec, task, show)
        found: xr.DataArray = xarray.open_zarr(self._output.url, storage_options=self._storage_options or None)[name]
        return found

    def _write(self, spec: PassSpec, task: Callable[..., scoring_task.ScoreReport], show: Progress) -> None:
        written, wake = self._output.read_written(), threading.Event()
        missing = deque(index for index, there in enumerate(written.tolist()) if not there)
        done = sum(self._rows(spec, chunk) for chunk in range(len(written)) if written[chunk])
        tasks = InFlightTasks(self._client, self._scoring.timeout_seconds, wake.set)
        pool, failures, marked = ScorerPool(self._client, self._scoring), Counter[int](), time.monotonic()
        show(done, spec.examples)
        try:
            while missing or len(tasks):
                wake.clear()
                for _ in range(min(len(missing), max(1, pool.capacity()) - len(tasks))):
                    self._launch(spec, task, missing.popleft(), tasks, pool)
                wake.wait(_POLL)
                for each in tasks.completed():
                    if isinstance(each.result, scoring_task.ScoreReport):
                        written[each.chunk] = True
                        done += each.result.examples
                        show(done, spec.examples)
                        continue
                    failures[each.chunk] += 1
                    if not (each.lost or isinstance(each.result, OSError | KilledWorker)):
                        raise each.result
                    if failures[each.chunk] == _TRIES:
                        raise each.result
                    logger.warning("chunk %d is tried again: %r", each.chunk, each.result)
                    missing.append(each.chunk)
                if time.monotonic() - marked > _MARK_SECONDS:
                    self._output.mark_written(written)
                    marked = time.monotonic()
        finally:
            tasks.cancel()
            self._output.mark_written(written)
            self._parameters = None

    def _launch(
        self, spec: PassSpec, task: Callable[..., Any], chunk: int, tasks: InFlightTasks, pool: ScorerPool
    ) -> None:
        if self._parameters is None or self._parameters.status in ("lost", "cancelled", "error"):
            key = f"params-{spec.run}-{uuid.uuid4().hex[:8]}"
            self._parameters = self._client.scatter({key: self._tensors}, hash=False)[key]
        future = self._client.submit(
            task,
            self._parameters,
            spec,
            chunk,
            *_ORDER,
            key=(f"{task.__name__}-{spec.run}", chunk, uuid.uuid4().hex[:8]),
            pure=False,
            **pool.placement(),
        )
        tasks.launch(chunk, future, _ORDER)

    @staticmethod
    def _rows(spec: PassSpec, chunk: int) -> int:
        return min(spec.chunk, spec.examples - chunk * spec.chunk)

    def _chunk_size(self) -> int:
        """Examples per task: a multiple of the dataset's chunk, about a second of work, and a few tasks at least."""
        unit, length = self._dataset.chunk_size, len(self._dataset)
        wanted = self._scoring.chunk_size or min(self._speed * _TASK_SECONDS, length / _LEAST_CHUNKS)
        return unit * max(1, int(wanted // unit))

    def _digest(self) -> str:
        """Return the sha256 of the state, by names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _require_same(self, wanted: Mapping[str, Any]) -> None:
        found = self._output.about
        wrong = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        if wrong:
            raise RunMismatchError(
                f"{self._output.url} holds the output of another pass: {', '.join(wrong)} differ. Pass overwrite=True "
                "to replace it, or choose another URL"
            )


@contextlib.contextmanager
def _shown(progress: Progress | None, name: str) -> Iterator[Progress]:
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True, force_jupyter=False), transient=True, disable=in_notebook()) as bar:
        row = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)

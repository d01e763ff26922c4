"""Scorers: a coordinator and scoring tasks on a Dask cluster, for a training loop that is not ours."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch.distributed as dist
from distributed import Client, Future, span, wait
from torch import Tensor, nn

from dask_isgd import config
from dask_isgd.checks.request import ENDLESS, RunRequest, prepare
from dask_isgd.checks.start import admit, keys_of, open_topic
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.coordinator.task import coordinate
from dask_isgd.core.loss import Loss
from dask_isgd.core.models import ModelSource
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import ConfigError, IsgdError, LeaseLostError
from dask_isgd.learner.shares import shares_of
from dask_isgd.loop.cluster_link import ClusterLink, Rewritten
from dask_isgd.loop.scored_batch_sampler import ScoredBatchSampler
from dask_isgd.runtime.placement import coordinator_placement
from dask_isgd.storage import RunDirectory

logger = logging.getLogger(__name__)

_START_SECONDS = 600.0
"""For how long the other processes wait for the one that starts the run."""


class _Begin(NamedTuple):
    """What all processes have to know of the run."""

    n: int
    chunk: int
    step: int


class Scorers:
    """Scores a dataset on a Dask cluster while a loop of its own trains: a context manager.

    ::

        with isgd.Scorers(client, "package:model", data, run_dir, loss=loss) as scorers:
            loader = DataLoader(isgd.Weighted(dataset), batch_sampler=scorers.batch_sampler(128), num_workers=4)
            for step, (index, coefficient, (x, y)) in enumerate(loader, scorers.step):
                ...  # any model code, optimizer and precision; weighted_mean(losses, coefficient) is the loss
                scorers.publish(model, step)

    The run directory, its weights and history, the dashboard and ``attach`` are those of a run of ``fit``, without
    checkpoints: the loop has its own, and puts ``state_dict()`` into them. ``model``, ``data``, ``run_dir``, ``loss``,
    ``scoring``, ``sampling``, ``validation``, ``overwrite`` and ``storage_options`` are as in ``fit``; the dataset of
    the loop has the same examples in the same order. ``publish_every``: steps between versions that are sent to the
    scorers, ``device``: where they score, ``steps``: how many the loop will make, if it knows, for displays. With
    ``resume`` the run in ``run_dir`` continues: its weights are there at once.

    The loop is a client outside the cluster and never waits for it: if the cluster is slow or dead, weights get old,
    which is logged once. In a process group of ``torch.distributed`` (``group``, or all) every process makes its own
    with the same arguments; only process 0 needs a ``client`` and publishes, and all use the weights that it reads.

    Raises, when it is entered, the errors that ``fit`` raises before it submits anything.
    """

    def __init__(
        self,
        client: Client | None,
        model: ModelSource,
        data: Any,
        run_dir: str | Path,
        *,
        loss: Loss | str | None = None,
        scoring: Scoring | None = None,
        sampling: Sampling | None = None,
        validation: Any = None,
        publish_every: int | None = None,
        steps: int | None = None,
        device: str = "auto",
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._client, self._group, self._seed = client, group, seed
        self._sampling = sampling or Sampling()
        learning = Learning(steps=ENDLESS if steps is None else steps, device=device, seed=seed)
        if publish_every is not None:
            learning = dataclasses.replace(learning, publish_every=publish_every)
        self._request = RunRequest(
            model=model,
            data=data,
            run_dir=run_dir,
            loss=loss,
            learning=learning,
            scoring=scoring or Scoring(),
            sampling=self._sampling,
            validation=validation,
            resume=resume,
            overwrite=overwrite,
            external=True,
            storage_options=storage_options or {},
        )
        self._link: ClusterLink | None = None
        self._coordinator: Future[Any] | None = None
        self._begin: _Begin | None = None
        self._sampler: ScoredBatchSampler | None = None
        self._state: Mapping[str, Any] | None = None

    # The context

    def __enter__(self) -> Self:
        shares = shares_of(self._group, timeout=_START_SECONDS)
        begin: _Begin | IsgdError | None = None
        failure: BaseException | None = None
        if shares.rank == 0:
            try:
                begin = self._start()
            except BaseException as error:
                failure = error
                begin = error if isinstance(error, IsgdError) else ConfigError(f"process 0 did not start: {error!r}")
        try:
            begin = shares.from_first(begin)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        finally:
            shares.close()
        if failure is not None:
            raise failure
        if isinstance(begin, IsgdError):
            raise begin
        self._begin = begin
        return self

    def _start(self) -> _Begin:
        """Start the run on the cluster; nothing is left open if that fails."""
        if self._client is None:
            raise ConfigError("Scorers: got client=None in process 0, wanted a dask.distributed.Client")
        client, prepared = self._client, prepare(self._request)
        spec = prepared.spec
        workers = admit(client, prepared)
        step = _last_step(spec.directory)
        keys = keys_of(spec)
        open_topic(client, spec, keys)
        self._link = ClusterLink(client, spec, prepared.document["model"]["signature"], step)
        self._link.open()
        try:
            place = coordinator_placement(workers, {"workers": []})
            with span(spec.topic):
                self._coordinator = client.submit(
                    coordinate, spec, key=keys["coordinator"], pure=False, priority=20, **place
                )
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self._coordinator.add_done_callback(lambda future: _log_error(spec, future))
        return _Begin(spec.examples, spec.chunk, step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is None:
            return
        if error is None:
            outcome = "finished"
        elif isinstance(error, LeaseLostError):
            outcome = "fenced"
        else:
            outcome = "failed" if isinstance(error, Exception) else "stopped"
        self._link.close(outcome, "" if error is None else f"{type(error).__name__}: {error}")
        if self._coordinator is not None:
            try:
                wait(self._coordinator, timeout=config.seconds("cluster.timeout"))
            except (
                Exception,
                asyncio.CancelledError,
            ) as late:  # a cluster that is gone
                logger.warning("the coordinator has not ended in time: %r", late)
            self._coordinator = None
        self._link = None

    # What the loop calls

    @property
    def step(self) -> int:
        """The step from which the loop continues: 0, or of a resumed run the one after its latest."""
        return 0 if self._begin is None else self._begin.step

    def batch_sampler(self, batch_size: int) -> ScoredBatchSampler:
        """Return the batch sampler of the loop's ``DataLoader``; ``batch_size`` is that of one process.

        It is an ``ImportanceBatchSampler``, whose ``update`` need not be called: the loop's own norms, if it reports
        them, are used as well. One loop has one.
        """
        if self._begin is None:
            raise ConfigError("Scorers.batch_sampler: called outside of `with`, wanted inside")
        if self._sampler is not None:
            raise ConfigError("Scorers.batch_sampler: called twice, wanted once: a run has one loop")
        link, nothing = self._link, list[Rewritten]
        self._sampler = ScoredBatchSampler(
            self._begin.n,
            batch_size,
            chunk_size=self._begin.chunk,
            sampling=self._sampling,
            seed=self._seed,
            start=self.step,
            known=link.everything() if link is not None else [],
            rewritten=nothing if link is None else link.rewritten,
            group=self._group,
        )
        if self._state is not None:
            self.load_state_dict(self._state)
        return self._sampler

    def publish(self, model: nn.Module, step: int, *, loss: float | Tensor = math.nan) -> None:
        """Report that the loop has made ``step``, and every ``publish_every`` steps send the parameters to the scorers.

        Call it once per minibatch, with steps that continue from ``scorers.step``. It returns at once: what is sent is
        copied here and travels in a thread. ``model`` is that of the run, or wrapped by DistributedDataParallel or
        ``torch.compile``. ``loss``, a number or a tensor, is shown in the history. In processes other than 0 nothing
        is done.

        Raises LeaseLostError if another loop has resumed the run, ModelError for other parameters than the model's.
        """
        if self._sampler is None:
            raise ConfigError("Scorers.publish: called before batch_sampler, wanted after it")
        self._sampler.made(step)
        if self._link is not None:
            self._link.advance(model, step, loss, self._sampler.drawing, self._sampler.minibatch)

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loop needs beside the run directory, for its checkpoint.

        Without it a resumed run has the weights of the run directory, and the loop's own feedback, its gain and its
        place in the pass are lost.
        """
        if self._sampler is None:
            raise ConfigError("Scorers.state_dict: called before batch_sampler, wanted after it")
        return {"sampler": self._sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, before the first minibatch; later scores of the run directory are kept."""
        self._state = state
        if self._sampler is None or self._begin is None:
            return
        self._sampler.load_state_dict(state["sampler"])
        self._begin = self._begin._replace(step=self._sampler.consumed)


def _last_step(directory: RunDirectory) -> int:
    """Return the step from which the run continues, after the latest that is reported or scored."""
    reported = directory.read_columns()["step"]
    versions = directory.open_weights().read_stamps()[:, 0]
    return int(max(np.nanmax(reported, initial=-1.0), np.nanmax(versions, initial=-1.0))) + 1


def _log_error(spec: RunSpec, future: Future[Any]) -> None:
    if future.status == "error":
        logger.warning("run %s: scoring has ended, and weights stay as they are: %r", spec.name, future.exception())

"""The specification of a run, which each of its tasks receives: one small frozen record that can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.core.loss import Loss, cross_entropy
from dask_isgd.core.models import ModelSource
from dask_isgd.events import topic_of
from dask_isgd.storage import Dataset, OutputArray, RunDirectory, WeightArray


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run: where it is stored, what it trains and how."""

    run: str
    """Unique id of the run, which begins with its name; part of every key, topic and Variable."""
    url: str
    """URL of the run directory."""
    model: ModelSource
    data: Dataset
    validation: Dataset | None
    loss: Loss | None
    learning: Learning
    scoring: Scoring
    sampling: Sampling
    chunk: int
    """Examples per scoring chunk."""
    attempt: int
    """Number of this start of the run; each ``fit`` has a greater one than those before."""
    detach: bool = False
    external: bool = False
    """Whether the learner is a loop outside the cluster: no worker is its own."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Options of the run directory for obstore: they may be secrets, so no repr, log, event or file contains them."""

    @property
    def loss_function(self) -> Loss:
        return self.loss if self.loss is not None else cross_entropy

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.url, storage_options=self.storage_options)

    def open_weights(self) -> WeightArray | OutputArray:
        """Open what scoring tasks write to."""
        return self.directory.open_weights()

    @property
    def name(self) -> str:
        """What people call the run: the name of its directory."""
        return self.directory.name

    @property
    def examples(self) -> int:
        return len(self.data)

    @property
    def n_chunks(self) -> int:
        return -(-self.examples // self.chunk)

    @property
    def scores(self) -> bool:
        """Whether anything is scored, if there is a worker for it."""
        return self.scoring.passes != 0 and not self.sampling.uniform

    @property
    def waits_for_scores(self) -> bool:
        """Whether training waits until all is scored."""
        return self.scores and self.learning.synchronous

    @property
    def feedback_suffices(self) -> bool:
        """Whether weights may come from the learner's own minibatches alone."""
        return self.sampling.feedback and not self.learning.synchronous

    @property
    def topic(self) -> str:
        return topic_of(self.run)

    @property
    def variable(self) -> str:
        """The Dask ``Variable`` that holds the latest parameters."""
        return f"isgd-params-{self.run}-{self.attempt}"


@dataclass(frozen=True, kw_only=True)
class PassSpec(RunSpec):
    """One pass of scoring tasks over a dataset, without a run: they write to the output at ``url``."""

    def open_weights(self) -> OutputArray:
        return OutputArray(self.url, storage_options=self.storage_options)

"""The rows of ``cost.py``: what is compared with what, and what must be reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SYSTEM_SHARE = 0.05
"""The kernel's share of a learner's CPU time must stay below it."""
MODELS = ("mlp-64", "mlp-128", "large-mlp", "resnet", "transformer")
CAPTURE_IS_CHEAP = ("mlp-64", "mlp-128", "large-mlp")
"""Models whose norms cost the backward pass little, so that a step with feedback is compared with a bare one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A comparison of a run with plain processes."""

    kind: str
    problem: str
    cluster: str = "local"
    must: float
    """The least ratio of the run's rate to the plain rate."""
    uniform: bool = False
    feedback: bool = True
    scored: bool = False
    """Whether scorers work, beside the learner; beside the plain loop, a plain norm loop then does."""
    task_seconds: float | None = None
    """Compare examples scored by tasks of about this length, not steps."""
    both_cores: bool = False
    """Whether learner and plain loop may use both cores; otherwise the first one only, and all else the second."""
    learner_threads: int | None = 1
    """torch threads of the learner; None: what the cluster gives it."""
    plain_threads: int = 1
    work: str = "training"
    """What the plain loop does: "training", or "capture" too."""
    neighbour: bool = False
    """Whether another program keeps the second core busy all the time."""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.problem}" + ("" if self.cluster == "local" else f"@{self.cluster}")


def rows() -> Iterator[Row]:
    """Yield all rows."""
    for problem in MODELS:
        cheap = problem in CAPTURE_IS_CHEAP
        yield Row(kind="uniform-1", problem=problem, must=0.95, uniform=True)
        yield _lone(problem)
        yield Row(kind="feedback", problem=problem, **_feedback(cheap))
        yield Row(kind="scored", problem=problem, scored=True, **_feedback(cheap))
        if not cheap:
            yield Row(kind="importance", problem=problem, must=0.90, feedback=False)
            yield Row(kind="scored-importance", problem=problem, must=0.90, feedback=False, scored=True)
        if problem != "mlp-128":
            yield Row(kind="scoring-1s", problem=problem, must=0.95, scored=True, task_seconds=1.0)
            yield Row(kind="scoring-0.1s", problem=problem, must=0.90, scored=True, task_seconds=0.1)
    yield dataclasses.replace(_lone("mlp-64"), kind="busy-neighbour", must=0.5, plain_threads=1, neighbour=True)
    for cluster in ("client", "worker"):
        yield Row(kind="uniform-1", problem="mlp-64", cluster=cluster, must=0.95, uniform=True)
        yield Row(kind="uniform-1", problem="large-mlp", cluster=cluster, must=0.95, uniform=True)
        yield dataclasses.replace(_lone("mlp-64"), cluster=cluster, learner_threads=2)
        yield Row(kind="scored", problem="mlp-64", cluster=cluster, scored=True, **_feedback(True))
        yield Row(kind="scoring-0.1s", problem="mlp-64", cluster=cluster, must=0.90, scored=True, task_seconds=0.1)


def _lone(problem: str) -> Row:
    return Row(
        kind="uniform-2",
        problem=problem,
        must=0.90,
        uniform=True,
        both_cores=True,
        learner_threads=None,
        plain_threads=2,
    )


def _feedback(cheap: bool) -> dict[str, Any]:
    return {"must": 0.90} if cheap else {"must": 0.95, "work": "capture"}

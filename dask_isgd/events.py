"""The events on a run's topic: small, plain records that msgpack can carry.

Events are hints: the truth about a run is in its directory and in one Dask ``Variable``. Each
event names its run, the incarnation that sent it, its sender and the sender's running number, by
which a late subscriber drops what it has already received.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

_SENDER = uuid.uuid4().hex[:12]
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Event:
    """The base class; subclasses add plain numbers, strings and lists."""

    kind: ClassVar[str] = ""
    run: str
    incarnation: int
    """Of the learner or coordinator; 0 if none is meant."""

    def record(self) -> dict[str, Any]:
        """Return the event as a dict of plain Python values, with sender and number added."""
        return {"kind": self.kind, "sender": _SENDER, "number": next(_numbers), **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Published(Event):
    """The parameters of a version are in the run's Variable."""

    kind: ClassVar[str] = "published"
    version: int
    """The learner's step at publication."""
    address: str
    """The address of the worker that runs the learner; of a loop outside the cluster, of one that holds the version."""
    checkpoint: str | None
    """The name of the latest committed checkpoint."""
    final: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """The latest row of the history, for people who follow the run."""

    kind: ClassVar[str] = "progress"
    step: int
    address: str
    open: bool
    """Whether the gate is open, so that draws follow the weights."""
    probing: bool = False
    """Whether just enough is scored to notice when importance sampling would pay."""
    why: str = ""
    """The reason for the state of the gate, in a few words."""
    steps: int | None = None
    """Steps of the run."""
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Group(Event):
    """Who learns in a run with several learners."""

    kind: ClassVar[str] = "group"
    learners: Sequence[str]
    """The addresses of their workers."""
    scorers: int
    """Workers that could learn, and score instead."""
    why: str
    """The reason for it, in a sentence; empty if there was no choice yet."""


@dataclass(frozen=True, kw_only=True)
class Scored(Event):
    """Chunks of the weight array were rewritten."""

    kind: ClassVar[str] = "scored"
    chunks: Sequence[Sequence[int]]
    """Chunk, and incarnation and version of the learner; msgpack turns lists into tuples."""
    examples: int
    """Examples scored by this coordinator so far."""
    per_second: float
    """Examples scored per second, recently."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """A version was evaluated on all of the validation data."""

    kind: ClassVar[str] = "evaluated"
    version: int
    loss: float
    error: float
    """Fraction of examples classified wrongly; NaN if there are no classes."""


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """A long task of the run has ended."""

    kind: ClassVar[str] = "ended"
    attempt: int
    """The start of the run that is meant, as the scheduler remembers the events of earlier ones."""
    role: str
    """``"learner"`` or ``"coordinator"``."""
    outcome: str
    """``"finished"``, ``"stopped"`` (the user's wish), ``"left"`` (the cluster's), ``"fenced"`` (by a newer lease),
    ``"superseded"`` (by a newer start of the run) or ``"failed"``."""
    step: int
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Control(Event):
    """What the user wants: ``"run"``, ``"pause"`` or ``"stop"``."""

    kind: ClassVar[str] = "control"
    attempt: int
    want: str


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Event):
    """A sign of life of a long task, about once per second."""

    kind: ClassVar[str] = "heartbeat"
    role: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Fault(Event):
    """Something was lost and is being recovered."""

    kind: ClassVar[str] = "fault"
    what: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class WeightSummary(Event):
    """What all weights look like, for people who follow the run; the fields: ``coordinator.weight_summary``."""

    kind: ClassVar[str] = "weight_summary"
    step: int
    cells: list[int]
    chunks: int
    never: int
    age_high: float
    age_counts: list[int]
    weight_low: float
    weight_high: float
    weight_counts: list[int]
    zeros: int
    sampled: int
    top_share: float | None


@dataclass(frozen=True, kw_only=True)
class ShareClaim(Event):
    """A run's coordinator claims its share of the scorers; on a topic that all coordinators receive."""

    kind: ClassVar[str] = "share_claim"


_KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        Published,
        Progress,
        Group,
        Scored,
        Evaluated,
        Ended,
        Control,
        Heartbeat,
        Fault,
        WeightSummary,
        ShareClaim,
    )
}


def name_of(run: str) -> str:
    """Return the name of the directory in which a run began, from its id.

    >>> name_of("my-run-5f0c12ab"), name_of("5f0c12ab34")
    ('my-run', '5f0c12ab34')
    """
    return run.rpartition("-")[0] or run


def topic_of(run: str) -> str:
    """Return the topic that carries the events of a run."""
    return f"isgd-{run}"


def parse(message: object) -> Event | None:
    """Return the event that a message holds, or None if it holds no known event."""
    if not isinstance(message, Mapping):
        return None
    cls = _KINDS.get(str(message.get("kind")))
    if cls is None:
        return None
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{k: v for k, v in message.items() if k in names})
    except TypeError:  # a record of another version of this package
        return None

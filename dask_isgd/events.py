"""What travels on a run's topic: small, plain records that msgpack can carry.

Events are hints: the truth of a run lives in its directory and in one Dask ``Variable``. Each
event names its run, the incarnation of the learner it speaks of, its sender and the sender's
running number, by which a late subscriber drops what it has already seen.
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
    """The root: subclasses add plain numbers, strings and lists."""

    kind: ClassVar[str] = ""
    run: str
    incarnation: int
    """Of the sender, learner or coordinator; 0 where none is meant."""

    def record(self) -> dict[str, Any]:
        """The event as a dict of plain Python values, with sender and number added."""
        return {"kind": self.kind, "sender": _SENDER, "number": next(_numbers), **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Published(Event):
    """Parameters of a version are to be had in the run's Variable."""

    kind: ClassVar[str] = "published"
    version: int
    """The learner's step at publication."""
    address: str
    """Of the worker that runs the learner."""
    checkpoint: str | None
    """The newest committed checkpoint."""
    final: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """The newest row of the history, for people who watch."""

    kind: ClassVar[str] = "progress"
    step: int
    address: str
    open: bool
    """Whether the gate is open, that is, whether draws follow the weights."""
    probing: bool = False
    """Whether scoring is only to notice when importance sampling would pay."""
    why: str = ""
    """Why the gate is as it is, in a few words."""
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Scored(Event):
    """Chunks of the weight array were rewritten."""

    kind: ClassVar[str] = "scored"
    chunks: Sequence[Sequence[int]]
    """Chunk, incarnation and version of the learner; msgpack brings lists as tuples."""
    examples: int
    """Examples scored by this coordinator so far."""
    per_second: float
    """Examples scored a second, lately."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """One version was evaluated on the whole validation data."""

    kind: ClassVar[str] = "evaluated"
    version: int
    loss: float
    error: float
    """Share of examples classified wrongly; NaN where there are no classes."""


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """A long task of the run came to its end."""

    kind: ClassVar[str] = "ended"
    attempt: int
    """Which start of the run is meant: the scheduler remembers the events of earlier ones."""
    role: str
    """``"learner"`` or ``"coordinator"``."""
    outcome: str
    """``"finished"``, ``"stopped"`` (the user's wish), ``"left"`` (the cluster's), ``"fenced"`` or ``"failed"``."""
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
    """A sign of life of a long task, about once a second while nothing else is said."""

    kind: ClassVar[str] = "heartbeat"
    role: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Fault(Event):
    """Something was lost and is being made good."""

    kind: ClassVar[str] = "fault"
    what: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class WeightSummary(Event):
    """What all weights look like, for people who watch; the fields: ``coordinator.weight_summary``."""

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
    """A run's coordinator wants its part of the scorers; on a topic all coordinators hear."""

    kind: ClassVar[str] = "share_claim"


_KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (Published, Progress, Scored, Evaluated, Ended, Control, Heartbeat, Fault, WeightSummary, ShareClaim)
}


def topic_of(run: str) -> str:
    """The topic that carries the events of a run."""
    return f"isgd-{run}"


def parse(message: object) -> Event | None:
    """The event a message holds, or None if it is none of ours."""
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

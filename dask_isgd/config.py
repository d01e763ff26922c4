"""What a user can set: three frozen dataclasses, validated whole at construction.

Defaults come from Dask's configuration under ``isgd:`` (see ``isgd.yaml``), so that a site
or an environment variable (``DASK_ISGD__LEARNING__BATCH_SIZE=256``) can change them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

from dask_isgd.errors import ConfigError

with Path(__file__).with_name("isgd.yaml").open() as _file:
    DEFAULTS = yaml.safe_load(_file)
dask.config.update_defaults(DEFAULTS)


def default(key: str) -> Any:
    """A dataclass field whose default is read from Dask's configuration when an object is made."""
    return field(default_factory=lambda: dask.config.get(f"isgd.{key}"))


def seconds(key: str) -> float:
    """A duration of the configuration, in seconds."""
    return float(parse_timedelta(dask.config.get(f"isgd.{key}"), default="s"))


class _Check:
    """Collects every mistake of a set of settings, then raises them together."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.mistakes: list[str] = []

    def number(
        self,
        name: str,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float | None = None,
        whole: bool = False,
        optional: bool = False,
    ) -> None:
        value = getattr(self.settings, name)
        if optional and value is None:
            return
        kinds = (int,) if whole else (int, float)
        bounds = [
            *([f"above {above}"] if above is not None else []),
            *([f"at least {least}"] if least is not None else []),
            *([f"at most {most}"] if most is not None else []),
        ]
        wanted = " ".join(["a whole number" if whole else "a number", *bounds])
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        fits = fits and (above is None or value > above) and (least is None or value >= least)
        if not (fits and (most is None or value <= most)):
            self.wrong(name, value, wanted + (" or None" if optional else ""))

    def choice(self, name: str, *allowed: str) -> None:
        value = getattr(self.settings, name)
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            self.wrong(name, value, f"one of {', '.join(map(repr, allowed))}{hint}")

    def flag(self, *names: str) -> None:
        for name in names:
            value = getattr(self.settings, name)
            if not isinstance(value, bool):
                self.wrong(name, value, "True or False")

    def call(self, name: str) -> None:
        value = getattr(self.settings, name)
        if value is not None and not callable(value):
            self.wrong(name, value, "a callable or None")

    def wrong(self, name: str, got: object, wanted: str) -> None:
        self.mistakes.append(f"{name}: got {got!r}, wanted {wanted}")

    def done(self) -> None:
        if self.mistakes:
            kind = type(self.settings).__name__
            raise ConfigError("\n".join(f"{kind}.{mistake}" for mistake in self.mistakes))


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the learner trains.

    ``optimizer`` is called with the parameters and returns a ``torch.optim.Optimizer``; None
    means SGD with ``learning_rate`` and Nesterov ``momentum``. ``scheduler`` is called with the
    optimizer and returns a learning-rate scheduler, stepped once a step.
    """

    steps: int
    """Optimizer updates in the whole run."""
    batch_size: int = default("learning.batch-size")
    """Examples a step."""
    learning_rate: float = default("learning.learning-rate")
    momentum: float = default("learning.momentum")
    optimizer: Callable[[Any], Any] | None = None
    scheduler: Callable[[Any], Any] | None = None
    device: str = default("learning.device")
    """``"auto"`` (cuda, mps, cpu: the first there is) or a torch device."""
    threads: int | None = default("learning.threads")
    """torch threads; None: as many as the learner's worker has."""
    publish_every: int = default("learning.publish-every")
    """Steps between publications; in synchronous mode the steps of a round."""
    publish_dtype: str | None = default("learning.publish-dtype")
    """``"float32"``, ``"bfloat16"`` or ``"float16"``: what scorers are sent; None: each parameter's own dtype."""
    report_every: int = default("learning.report-every")
    """Steps between rows of the history."""
    evaluate_every: int = default("learning.evaluate-every")
    """Steps between evaluations; rounded up to a publication."""
    checkpoint_seconds: float = default("learning.checkpoint-seconds")
    checkpoint_steps: int | None = default("learning.checkpoint-steps")
    """A checkpoint is committed at the sooner of the two; the last step always is."""
    clip_norm: float | None = default("learning.clip-norm")
    """Scale the gradient down to this norm if it is larger, as ``torch.nn.utils.clip_grad_norm_`` does; None: never."""
    clip_median_factor: float | None = default("learning.clip-median-factor")
    """The same at this multiple of the running median of the gradient's norm; the smaller bound counts. None: never."""
    cache_memory: int | str = default("learning.cache-memory")
    """Bytes of training data the learner may hold, or a string such as ``"2GB"``."""
    cache_disk: int | str = default("learning.cache-disk")
    """Bytes of the learner's local disk that an uncompressed copy of compressed or remote data may take; 0: none."""
    transform: Callable[..., Any] | None = None
    """Applied to the inputs of each minibatch on the learner's device, in the learner only: scorers see examples as
    they are stored, which chooses what is drawn and leaves the gradient unbiased."""
    synchronous: bool = False
    """Score everything, then ``publish_every`` steps, and again: bit-reproducible, waits for scorers."""
    seed: int = default("learning.seed")

    def __post_init__(self) -> None:
        check = _Check(self)
        for name in ("steps", "batch_size", "publish_every", "report_every", "evaluate_every"):
            check.number(name, least=1, whole=True)
        check.number("learning_rate", above=0)
        check.number("momentum", least=0, most=1)
        check.number("threads", least=1, whole=True, optional=True)
        check.number("checkpoint_seconds", above=0)
        check.number("checkpoint_steps", least=1, whole=True, optional=True)
        check.number("clip_norm", above=0, optional=True)
        check.number("clip_median_factor", above=0, optional=True)
        check.number("seed", least=0, whole=True)
        if self.publish_dtype is not None:
            check.choice("publish_dtype", "float32", "bfloat16", "float16")
        check.flag("synchronous")
        for name in ("optimizer", "scheduler", "transform"):
            check.call(name)
        _bytes(check, "cache_memory")
        _bytes(check, "cache_disk", least=0)
        check.done()

    @property
    def cache_memory_bytes(self) -> int:
        return int(parse_bytes(self.cache_memory))

    @property
    def cache_disk_bytes(self) -> int:
        return int(parse_bytes(self.cache_disk))


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the norms are kept fresh."""

    method: str = default("scoring.method")
    """``"exact"`` gradient norms, ``"bound"`` (last pre-activation) or ``"loss"``."""
    batch_size: int = default("scoring.batch-size")
    """Examples scored at once."""
    chunk_size: int | None = default("scoring.chunk-size")
    """Examples a scoring task, a multiple of the dataset's chunk; None: about a second's worth."""
    in_flight: int = default("scoring.in-flight")
    """Scoring tasks submitted ahead, per thread of a scorer."""
    threads: int = default("scoring.threads")
    """torch threads of one scoring task."""
    resources: Mapping[str, float] | None = None
    """Worker resources a scoring task asks for; None: ``scorer`` where workers declare it."""
    timeout: float | str = default("scoring.timeout")
    """Seconds, or a string such as ``"10 minutes"``, after which a task is submitted anew."""
    cache_memory: int | str = default("scoring.cache-memory")
    """Bytes of data a scorer's worker keeps decoded between passes, or a string such as ``"1GB"``; 0: none."""
    train_mode: bool = False
    """Score with dropout on; either way the gradient stays unbiased."""
    skip_bad_chunks: bool = False
    """Go on without the scoring chunk around a missing or corrupt chunk of the data, neither scored nor drawn, and do
    not fail. What ``fit`` looks at must be whole: the targets; the first, the middle and the last chunk."""

    def __post_init__(self) -> None:
        check = _Check(self)
        check.choice("method", "exact", "bound", "loss")
        for name in ("batch_size", "in_flight", "threads"):
            check.number(name, least=1, whole=True)
        check.number("chunk_size", least=1, whole=True, optional=True)
        check.flag("train_mode", "skip_bad_chunks")
        resources = self.resources
        if resources is not None and not (
            isinstance(resources, Mapping)
            and all(isinstance(k, str) and isinstance(v, (int, float)) and v > 0 for k, v in resources.items())
        ):
            check.wrong("resources", resources, "a mapping of resource names to positive numbers or None")
        try:
            positive = self.timeout_seconds > 0
        except (ValueError, KeyError, TypeError):
            positive = False
        if not positive:
            check.wrong("timeout", self.timeout, "seconds or a string such as '10 minutes'")
        _bytes(check, "cache_memory", least=0)
        check.done()

    @property
    def cache_memory_bytes(self) -> int:
        return int(parse_bytes(self.cache_memory))

    @property
    def timeout_seconds(self) -> float:
        return float(parse_timedelta(self.timeout, default="s"))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The proposal that minibatches are drawn from.

    ``smoothing``, ``max_coefficient`` and ``ess_fraction`` each ask for a constant added
    to every weight; the largest of the three is added.
    """

    scheme: str = default("sampling.scheme")
    """``"stratified"``, ``"independent"`` or ``"systematic"``."""
    smoothing: float = default("sampling.smoothing")
    """Constant added to every weight, in units of the mean weight."""
    max_coefficient: float | None = default("sampling.max-coefficient")
    """Bound on every coefficient 1/(N q), above 1."""
    ess_fraction: float | None = default("sampling.ess-fraction")
    """Least (Σq)²/(N Σq²), a fraction of N in (0, 1]."""
    half_life_steps: float | None = default("sampling.half-life-steps")
    """Steps of age after which a chunk's weights have half faded to the mean; None: never."""
    max_age_steps: int | None = default("sampling.max-age-steps")
    """Steps of age after which a chunk is not drawn: the paper's policy, **biased**."""
    exponent: float = default("sampling.exponent")
    """Exponent of the weights."""
    ema_decay: float = default("sampling.ema-decay")
    """Share in [0, 1) of a weight's former square that a fresh norm leaves: weights that fluctuate less."""
    gate: str = default("sampling.gate")
    """``"auto"``: uniform until importance sampling pays; ``"open"``: always importance sampling."""
    gate_gain: float = default("sampling.gate-gain")
    """Gain (uniform's second moment over the proposal's) above which the gate opens."""
    feedback: bool = default("sampling.feedback")
    """Norms of the learner's own minibatches update the weights of the examples drawn."""
    uniform: bool = False
    """Uniform draws and no scoring: the baseline."""

    def __post_init__(self) -> None:
        check = _Check(self)
        check.choice("scheme", "stratified", "independent", "systematic")
        check.choice("gate", "auto", "open")
        check.number("smoothing", least=0)
        check.number("max_coefficient", above=1, optional=True)
        check.number("ess_fraction", above=0, most=1, optional=True)
        check.number("half_life_steps", above=0, optional=True)
        check.number("max_age_steps", least=1, whole=True, optional=True)
        check.number("exponent", above=0, most=4)
        check.number("ema_decay", least=0, most=0.999)
        check.number("gate_gain", least=1)
        check.flag("feedback", "uniform")
        check.done()


def _bytes(check: _Check, name: str, *, least: int = 1) -> None:
    value = getattr(check.settings, name)
    try:
        fits = parse_bytes(value) >= least
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits:
        check.wrong(name, value, "a number of bytes or a string such as '2GB'")


_Settings = TypeVar("_Settings", Learning, Scoring, Sampling)


def from_mapping(kind: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    """Settings from a recipe's mapping; an unknown key gets the nearest valid one suggested."""
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = []
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            unknown.append(f"{kind.__name__}: unknown key {key!r}; {hint}")
    if unknown:
        raise ConfigError("\n".join(unknown))
    return kind(**values)


def to_mapping(settings: Learning | Scoring | Sampling) -> dict[str, Any]:
    """Settings as plain JSON: what ``run.json`` keeps. Callables become their names."""

    def plain(value: Any) -> Any:
        if callable(value):
            return getattr(value, "__qualname__", repr(type(value).__name__))
        return dict(value) if isinstance(value, Mapping) else value

    return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}

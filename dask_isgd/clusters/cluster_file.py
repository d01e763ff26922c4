"""A cluster in a file: ``cluster.yaml``, checked whole before anything is started.

``docs/clusters.md`` explains the keys, ``examples/clusters/`` has a file for each kind.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

from dask_isgd.clusters.jobqueue import QUEUES, job_options
from dask_isgd.errors import ConfigError

KINDS = ("local", "scheduler", "dask-cuda", *QUEUES)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a ``cluster.yaml`` says; made by :func:`load_cluster`."""

    kind: str
    """``local``, ``scheduler``, ``dask-cuda`` or the name of a queue."""
    scorers: int | None = None
    """Scorers (a queue: their jobs) to have from the start; None: the kind's default."""
    adapt: tuple[int, int] | None = None
    """Least and most scorers where their number follows the need."""
    learners: int = 1
    job: Mapping[str, Any] = field(default_factory=dict)
    """Options of every job, as dask-jobqueue spells them."""
    learner: Mapping[str, Any] = field(default_factory=dict)
    scorer: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    scheduler_file: str | None = None
    gpus: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``LocalCUDACluster``."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Options of the scheduler that is started here: host, port, interface, dashboard_address."""
    security: str | Mapping[str, str] | None = None
    """``"temporary"`` or paths: ca_file, cert, key."""
    shared_directory: str | None = None
    dask: Mapping[str, Any] = field(default_factory=dict)
    """Dask configuration, here and on the workers that are started."""
    wait: float | None = None
    """Seconds to wait for the learner's worker, at the start and after it was lost; None: ``isgd.cluster.timeout``."""


_QUEUING = "1 hour"

# Each check returns what it wanted, or None if the value is that.
_Check = Callable[[Any], str | None]


def _whole(least: int) -> _Check:
    def check(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if fits else f"a whole number at least {least}"

    return check


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a string"


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) and all(isinstance(k, str) for k in value) else "a mapping"


def _scorers(value: Any) -> str | None:
    wanted = "a whole number at least 0, or {minimum: 0, maximum: 8}"
    if isinstance(value, Mapping):
        low, high = value.get("minimum", 0), value.get("maximum")
        fits = set(value) <= {"minimum", "maximum"} and _whole(0)(low) is None and _whole(1)(high) is None
        return None if fits and low <= high else wanted
    return None if _whole(0)(value) is None else wanted


def _gpus(value: Any) -> str | None:
    fits = (
        isinstance(value, list) and value and all(isinstance(v, (int, str)) and not isinstance(v, bool) for v in value)
    )
    return None if fits else "a list of GPUs, such as [0, 1]"


_FILES = ("ca_file", "cert", "key")


def _security(value: Any) -> str | None:
    if value == "temporary":
        return None
    given = {str(k).replace("-", "_"): v for k, v in value.items()} if isinstance(value, Mapping) else {}
    fits = set(given) == set(_FILES) and all(isinstance(v, str) for v in given.values())
    return None if fits else "temporary, or a mapping of ca-file, cert and key to paths"


def _files(value: Any) -> str | None:
    wrong = _security(value)
    if wrong is None and value == "temporary":
        return "a mapping of ca-file, cert and key to paths: those the running scheduler uses"
    return wrong


def _duration(value: Any) -> str | None:
    try:
        return None if not isinstance(value, bool) and parse_timedelta(value, default="s") > 0 else "a duration"
    except (ValueError, TypeError, KeyError):
        return "a duration such as '10 minutes'"


def _memory(value: Any) -> str | None:
    try:
        return None if not isinstance(value, bool) and parse_bytes(value) > 0 else "memory such as '8GB'"
    except (ValueError, TypeError, AttributeError):
        return "memory such as '8GB'"


def _any(value: Any) -> str | None:
    return None  # dask-jobqueue knows


def _lines(value: Any) -> str | None:
    # HTCondor takes directives as a mapping
    fits = isinstance(value, Mapping) or (isinstance(value, list) and all(isinstance(line, str) for line in value))
    return None if fits else "a list of strings"


def _walltime(value: Any) -> str | None:
    # unquoted, YAML reads 04:00:00 as the number 14400
    return None if isinstance(value, str) else "a string in quotes such as '04:00:00'"


LIFETIME = ("lifetime", "lifetime_stagger")
"""Options of a job beside dask-jobqueue's: they become arguments of its worker."""
_JOB: dict[str, _Check] = {
    **dict.fromkeys(LIFETIME, _duration),
    "cores": _whole(1),
    "processes": _whole(1),
    "memory": _memory,
    "walltime": _walltime,
    "job_extra_directives": _lines,
    "job_script_prologue": _lines,
    "job_directives_skip": _lines,
    "worker_extra_args": _lines,
    **dict.fromkeys(("queue", "account", "python", "interface", "local_directory", "log_directory"), _text),
}
_SCHEDULER: dict[str, _Check] = {
    **dict.fromkeys(("host", "interface", "dashboard_address"), _text),
    "port": _whole(0),
}
_COMMON: dict[str, _Check] = {"security": _security, "dask": _mapping, "wait": _duration}
_QUEUE: dict[str, _Check] = {
    **_COMMON,
    "scorers": _scorers,
    "learners": _whole(1),
    **dict.fromkeys(("job", "learner", "scorer", "scheduler"), _mapping),
    "shared_directory": _text,
}
_KEYS: dict[str, dict[str, _Check]] = {
    "local": {**_COMMON, "scorers": _scorers, "learners": _whole(1), "gpus": _gpus},
    "scheduler": {**_COMMON, "security": _files, "address": _text, "scheduler_file": _text},
    "dask-cuda": {**_COMMON, "options": _mapping},
    **dict.fromkeys(QUEUES, _QUEUE),
}


def load_cluster(path: str | Path) -> ClusterConfig:
    """The cluster a YAML file describes. Raises ConfigError that lists every mistake in it."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); wanted a cluster in YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    try:
        return cluster_from_mapping(content)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def cluster_from_mapping(content: Any) -> ClusterConfig:
    """A cluster from plain values, as :func:`load_cluster` reads them."""
    if _mapping(content) is not None:
        raise ConfigError(f"got {type(content).__name__}, wanted a mapping with the key cluster")
    given = _underscored(content)
    kind = given.pop("cluster", None)
    if kind not in KINDS:
        raise ConfigError(f"cluster: got {kind!r}, wanted one of {', '.join(KINDS)}{_hint(str(kind), KINDS)}")
    mistakes = _mistakes("", given, _KEYS[kind])
    for name in ("job", "learner", "scorer"):
        if kind in QUEUES and name in given and _mapping(given[name]) is None:
            given[name] = _underscored(given[name])
            mistakes += _mistakes(f"{name}.", given[name], {key: _JOB.get(key, _any) for key in _options(kind)})
    if kind in QUEUES and "scheduler" in given and _mapping(given["scheduler"]) is None:
        given["scheduler"] = _underscored(given["scheduler"])
        mistakes += _mistakes("scheduler.", given["scheduler"], _SCHEDULER)
    mistakes += _contradictions(kind, given)
    if mistakes:
        raise ConfigError("\n".join(sorted(mistakes)))
    return _made(kind, given)


def _options(kind: str) -> set[str]:
    """What a job of this kind can be told; asking brings dask-jobqueue's defaults into Dask's configuration."""
    return {*job_options(kind), *LIFETIME}


def _underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _hint(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean {close[0].replace('_', '-')!r}?" if close else ""


def _mistakes(prefix: str, given: Mapping[str, Any], known: Mapping[str, _Check]) -> list[str]:
    found = []
    for key, value in given.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if key not in known:
            hint = _hint(key, known) or f"; known: {', '.join(k.replace('_', '-') for k in sorted(known))}"
            found.append(f"{name}: unknown key{hint}")
        elif (wanted := known[key](value)) is not None:
            found.append(f"{name}: got {value!r}, wanted {wanted}")
    return found


def _contradictions(kind: str, given: Mapping[str, Any]) -> list[str]:
    if kind == "scheduler" and ("address" in given) == ("scheduler_file" in given):
        return ["address: wanted this, as in tcp://10.0.0.1:8786, or scheduler-file, not both"]
    if kind not in QUEUES:
        return []
    found = []
    parts: dict[str, Mapping[str, Any]] = {}
    for name in ("job", "learner", "scorer"):
        part = given.get(name)
        parts[name] = part if isinstance(part, Mapping) else {}
    _options(kind)
    section = f"jobqueue.{kind}"
    for need in ("cores", "memory", *(["disk"] if kind == "htcondor" else [])):
        if need not in parts["job"] and dask.config.get(f"{section}.{need}", None) is None:
            found += [
                f"{role}.{need}: got nothing, wanted it here or under job"
                for role in ("learner", "scorer")
                if need not in parts[role]
            ]
    if parts["learner"].get("processes", 1) != 1:
        found.append("learner.processes: a learner is one process; for several runs at a time say learners: 2")
    if given.get("security") == "temporary" and "shared_directory" not in given:
        found.append("shared-directory: wanted with security: temporary; the jobs read their keys there")
    return found


def _made(kind: str, given: dict[str, Any]) -> ClusterConfig:
    scorers = given.pop("scorers", None)
    if isinstance(scorers, Mapping):
        given["adapt"] = (scorers.get("minimum", 0), scorers["maximum"])
        scorers = scorers.get("minimum", 0)
    if "gpus" in given:
        given["gpus"] = tuple(map(str, given["gpus"]))
    if isinstance(given.get("security"), Mapping):
        given["security"] = _underscored(given["security"])
    if "options" in given:
        given["options"] = _underscored(given["options"])
    wait = given.get("wait", _QUEUING if kind in QUEUES else None)
    given["wait"] = None if wait is None else float(parse_timedelta(wait, default="s"))
    return ClusterConfig(kind=kind, scorers=scorers, **given)

"""What a ``cluster.yaml`` may hold: one model for each kind of cluster, for validation and for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from dask.utils import parse_timedelta
from pydantic import AfterValidator, ConfigDict, Field

from dask_isgd.field_types import Bytes, Count, Duration, Fits, Natural, Text, is_whole
from dask_isgd.names import hyphenated, keys_underscored
from dask_isgd.validation import FileModel

_ABSENT: Any = None
"""Default of a key that may be left out but may not be null."""
_UNDERSCORED = AfterValidator(keys_underscored)
_KEY_FILES = {"ca_file", "cert", "key"}
_PATHS = {
    "type": "object",
    "properties": {hyphenated(name): {"type": "string"} for name in sorted(_KEY_FILES)},
    "required": [hyphenated(name) for name in sorted(_KEY_FILES)],
    "additionalProperties": False,
}


def _are_key_files(value: Any) -> bool:
    return set(keys_underscored(value)) == _KEY_FILES and all(isinstance(path, str) for path in value.values())


def _are_options(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_range(value: Mapping[str, Any]) -> bool:
    low, high = value.get("minimum", 0), value.get("maximum")
    return set(value) <= {"minimum", "maximum"} and is_whole(low, 0) and is_whole(high, 1) and low <= high


def _are_gpus(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) or is_whole(v, 0) for v in value)


def _are_lines(value: Any) -> bool:  # HTCondor takes directives as a mapping
    return isinstance(value, (dict, list)) and (isinstance(value, dict) or all(isinstance(line, str) for line in value))


Options = Annotated[Mapping[str, Any], Fits(_are_options, "a mapping", {"type": "object"})]
Scorers = Annotated[
    int | Mapping[str, int],
    Fits(
        lambda value: is_whole(value, 0) or _is_range(value),
        "a whole number at least 0, or {minimum: 0, maximum: 8}",
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {
                    "type": "object",
                    "properties": {
                        "minimum": {"type": "integer", "minimum": 0},
                        "maximum": {"type": "integer", "minimum": 1},
                    },
                    "required": ["maximum"],
                    "additionalProperties": False,
                },
            ]
        },
    ),
]
Gpus = Annotated[
    list[int | str],
    Fits(
        _are_gpus,
        "a list of GPUs, such as [0, 1]",
        {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1},
    ),
    AfterValidator(lambda value: tuple(map(str, value))),
]
Lines = Annotated[
    list[str] | Mapping[str, Any],
    Fits(_are_lines, "a list of strings", {"type": ["array", "object"], "items": {"type": "string"}}),
]
Walltime = Annotated[  # unquoted, YAML reads 04:00:00 as the number 14400
    str,
    Fits(lambda value: isinstance(value, str), "a string in quotes such as '04:00:00'", {"type": "string"}),
]
Security = Annotated[
    str | Mapping[str, str],
    Fits(
        lambda value: value == "temporary" or _are_key_files(value),
        "temporary, or a mapping of ca-file, cert and key to paths",
        {"anyOf": [{"const": "temporary"}, _PATHS]},
    ),
    _UNDERSCORED,
]
KeyFiles = Annotated[
    Mapping[str, str],
    Fits(_are_key_files, "a mapping of ca-file, cert and key to paths: those that the running scheduler uses", _PATHS),
    _UNDERSCORED,
]


class Cluster(FileModel):
    """Keys of every kind of cluster."""

    dask: Options = _ABSENT
    """Dask configuration, here and on the workers that are started."""
    wait: Annotated[Duration, AfterValidator(lambda value: float(parse_timedelta(value, default="s")))] = _ABSENT
    """How long to wait for the learner's worker, at the start and after a loss; queues: an hour."""


class Local(Cluster):
    """Processes of this machine, on the loopback address."""

    cluster: Literal["local"]
    scorers: Scorers = _ABSENT
    """How many scorers, or {minimum: 1, maximum: 8}: as many as pay."""
    learners: Count = _ABSENT
    """Workers for learners: one for each run that trains at the same time."""
    gpus: Gpus = _ABSENT
    """Each process sees one of these, in turn; default: those in CUDA_VISIBLE_DEVICES, else all."""
    security: Security = _ABSENT
    """temporary (TLS with keys made for this cluster alone), or paths of ca-file, cert and key."""


class Scheduler(Cluster):
    """A scheduler that is already running."""

    cluster: Literal["scheduler"]
    address: Text = _ABSENT
    """Where the scheduler runs; this or scheduler-file."""
    scheduler_file: Text = _ABSENT
    """The file that the scheduler wrote; this or address."""
    security: KeyFiles = _ABSENT
    """Paths of ca-file, cert and key: those that the scheduler uses."""


class DaskCuda(Cluster):
    """One process per GPU of this machine, by dask-cuda."""

    cluster: Literal["dask-cuda"]
    options: Annotated[Options, _UNDERSCORED] = _ABSENT
    """Arguments of dask_cuda.LocalCUDACluster."""
    security: Security = _ABSENT
    """temporary (TLS with keys made for this cluster alone), or paths of ca-file, cert and key."""


class Job(FileModel):
    """Options of a job: dask-jobqueue's, and the lifetime of its worker."""

    model_config = ConfigDict(extra="allow")  # the rest depends on the queue: see cluster_file
    cores: Count = _ABSENT
    processes: Count = _ABSENT
    memory: Bytes = _ABSENT
    walltime: Walltime = _ABSENT
    queue: Text = _ABSENT
    account: Text = _ABSENT
    python: Text = _ABSENT
    interface: Text = _ABSENT
    local_directory: Text = _ABSENT
    log_directory: Text = _ABSENT
    job_extra_directives: Lines = _ABSENT
    job_script_prologue: Lines = _ABSENT
    job_directives_skip: Lines = _ABSENT
    worker_extra_args: Lines = _ABSENT
    lifetime: Duration = _ABSENT
    """After this time the worker leaves in order."""
    lifetime_stagger: Duration = _ABSENT
    """Random spread of lifetimes, so that workers don't leave together."""


class SchedulerOptions(FileModel):
    """Options of the scheduler, which runs in the process that reads the file."""

    host: Text = _ABSENT
    port: Natural = _ABSENT
    interface: Text = _ABSENT
    dashboard_address: Text = _ABSENT


class Queue(Cluster):
    """Jobs of a batch queue, by dask-jobqueue."""

    cluster: Literal["slurm", "pbs", "sge", "lsf", "htcondor", "oar", "moab"]
    scorers: Scorers = _ABSENT
    """How many scorers' jobs, or {minimum: 1, maximum: 8}: as many as pay."""
    learners: Count = _ABSENT
    """Jobs for learners: one for each run that trains at the same time."""
    job: Job = _ABSENT
    """Options of every job."""
    learner: Job = _ABSENT
    """Options in which the learner's job differs."""
    scorer: Job = _ABSENT
    """Options in which the scorers' jobs differ."""
    scheduler: SchedulerOptions = _ABSENT
    """Options of the scheduler, which runs in this process."""
    security: Security = _ABSENT
    """temporary (TLS with keys made for this cluster alone), or paths of ca-file, cert and key."""
    shared_directory: Text = _ABSENT
    """Where jobs can read temporary keys."""


AnyCluster = Annotated[Local | Scheduler | DaskCuda | Queue, Field(discriminator="cluster")]
MODELS: dict[str, type[Cluster]] = {"local": Local, "scheduler": Scheduler, "dask-cuda": DaskCuda}
"""By kind; every other kind is a Queue."""

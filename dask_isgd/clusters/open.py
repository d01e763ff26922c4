"""Open the cluster that a configuration describes, for the duration of a ``with`` block."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import dask.config
from dask.utils import parse_timedelta
from distributed import Client, Security

from dask_isgd.clusters import jobqueue
from dask_isgd.clusters.cluster_file import LIFETIME, ClusterConfig
from dask_isgd.clusters.local import LocalCluster
from dask_isgd.errors import ConfigError, WaitTimeoutError
from dask_isgd.extras import needs
from dask_isgd.names import hyphenated
from dask_isgd.runtime import dask_internals


@contextlib.contextmanager
def open_cluster(config: ClusterConfig) -> Iterator[Client]:
    """Start the cluster or connect to it, yield a client, and close at the end what was started.

    Raises WaitTimeoutError if no scheduler answers, MissingExtraError if a package is missing, ConfigError if an
    option is rejected.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(dict(config.dask)))
        if config.wait is not None:
            stack.enter_context(dask.config.set({"isgd.cluster.timeout": config.wait}))
        if config.kind == "scheduler":
            yield stack.enter_context(_connect(config))
            return
        try:
            cluster = _start(config)
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"cluster {config.kind}: the cluster cannot be started: {error}") from error
        stack.enter_context(cluster)
        if config.adapt is not None:
            cluster.adapt(minimum=config.adapt[0], maximum=config.adapt[1])
        yield stack.enter_context(Client(cluster))


def security_of(config: ClusterConfig) -> Security | None:
    """Return Dask's TLS settings: from files, or created for this cluster only."""
    if config.security is None:
        return None
    if config.security == "temporary":
        temporary: Security = Security.temporary()
        return temporary
    files = config.security
    assert isinstance(files, Mapping)
    keys = {f"tls_{role}_{part}": files[part] for role in ("scheduler", "worker", "client") for part in ("cert", "key")}
    return Security(tls_ca_file=files["ca_file"], require_encryption=True, **keys)


def _connect(config: ClusterConfig) -> Client:
    place = config.address or config.scheduler_file
    try:
        if config.scheduler_file is not None:
            return Client(scheduler_file=config.scheduler_file, security=security_of(config))
        return Client(config.address, security=security_of(config))
    except TypeError as error:  # what Dask raises for tls:// without keys
        raise ConfigError(f"security: wanted the scheduler's ca-file, cert and key for {place!r} ({error})") from error
    except (OSError, ValueError) as error:
        raise WaitTimeoutError(
            f"no reply from a Dask scheduler at {place!r} ({error}); is it running, are address and keys correct?"
        ) from error


def _start(config: ClusterConfig) -> Any:
    if config.kind == "local":
        workers = None if config.scorers is None else config.scorers + config.learners
        return LocalCluster(workers, learners=config.learners, gpus=config.gpus, security=security_of(config))
    if config.kind == "dask-cuda":
        return _start_cuda(config)
    options = queue_options(config)
    return getattr(jobqueue, jobqueue.QUEUES[config.kind])(**options)


def _start_cuda(config: ClusterConfig) -> Any:
    with needs("cuda", "cluster dask-cuda"):
        dask_cuda = importlib.import_module("dask_cuda")
    options = {"dashboard_address": "127.0.0.1:8787", "host": "127.0.0.1", **config.options}
    return dask_cuda.LocalCUDACluster(security=security_of(config), **options)


def queue_options(config: ClusterConfig) -> dict[str, Any]:
    """Return the keyword arguments of a queue's cluster class."""
    prologue = []
    if config.dask:  # workers read the configuration of their own machine and merge this into it
        prologue = [dask_internals.export_config(config.dask)]

    def job(*parts: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for part in parts:
            options |= part
        arguments = list(options.pop("worker_extra_args", ()))
        for name in LIFETIME:
            if name in options:
                seconds = parse_timedelta(options.pop(name), default="s")
                arguments += [f"--{hyphenated(name)}", f"{seconds:g}s"]
        if arguments:
            options["worker_extra_args"] = arguments
        if prologue:
            options["job_script_prologue"] = [*options.get("job_script_prologue", ()), *prologue]
        return options

    learner, scorer = job(config.job, config.learner), job(config.job, config.scorer)
    return {
        **scorer,
        # options that only the scorers' jobs have must not reach the learner's
        "learner": {**{name: None for name in scorer if name not in learner}, **learner},
        "learners": config.learners,
        "n_workers": 1 if config.scorers is None else config.scorers,
        "security": security_of(config),
        "shared_temp_directory": config.shared_directory,
        **({"scheduler_options": dict(config.scheduler)} if config.scheduler else {}),
    }

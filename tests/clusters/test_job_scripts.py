"""What each queue is asked for: a learner's job unlike the scorers', on every class of dask-jobqueue."""

from __future__ import annotations

import asyncio
import re
import sys

import dask_jobqueue
import pytest

from dask_isgd import clusters
from dask_isgd.clusters.jobqueue import QUEUES, with_learner
from dask_isgd.errors import ConfigError
from dask_isgd.runtime.allocator import EXPORT

HOURS = {"walltime": "02:00:00", "queue": "gpu"}
EXTRA: dict[str, dict[str, object]] = {
    "OARCluster": {"memory_per_core_property_name": "not_applicable"},
    "HTCondorCluster": {"disk": "1GB"},
}


def scripts(name: str, learner: dict[str, object], **options: object) -> tuple[str, str]:
    """The learner's and the scorer's script of a cluster that is never started."""

    async def made() -> tuple[str, str]:
        kind = getattr(clusters, name)
        cluster = kind(
            cores=4,
            memory="8GB",
            learner=learner,
            scheduler_options={"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
            asynchronous=True,
            **EXTRA.get(name, {}),
            **options,
        )
        try:
            return cluster.job_script("learner"), cluster.job_script()
        finally:
            await cluster.close()

    return asyncio.run(made())


# What a learner's job asks for that a scorer's does not, and the other way round.
ASKED = {
    "SLURMCluster": (HOURS, ["-p gpu", "-t 02:00:00", "--mem=30G", "--cpus-per-task=2"], ["--cpus-per-task=4"]),
    "PBSCluster": (HOURS, ["-q gpu", "walltime=02:00:00", "ncpus=2:mem=30GB"], ["ncpus=4"]),
    "SGECluster": (HOURS, ["-q gpu", "h_rt=02:00:00"], ["h_rt=00:30:00"]),
    "LSFCluster": ({**HOURS, "walltime": "02:00"}, ["-q gpu", "-W 02:00", "-n 2"], ["-n 4"]),
    "OARCluster": (HOURS, ["-q gpu", "walltime=02:00:00", "/core=2"], ["/core=4"]),
    "MoabCluster": (HOURS, ["-q gpu", "walltime=02:00:00"], ["walltime=00:30:00"]),
    "HTCondorCluster": ({}, ["DaskWorkerCores = 2", "DaskWorkerMemory = 32000000000"], ["DaskWorkerCores = 4"]),
}


def test_every_queue_is_here():
    assert set(ASKED) == set(QUEUES.values())


@pytest.mark.parametrize("name", list(ASKED))
def test_a_learners_job_is_unlike_a_scorers(name):
    options, only_learner, only_scorer = ASKED[name]
    learner, scorer = scripts(name, {"cores": 2, "memory": "32GB", **options})
    for text in [*only_learner, "--resources learner=1", "--preload dask_isgd.clusters.sigterm_preload"]:
        assert text in learner
        assert text not in scorer
    for text in [*only_scorer, "--resources scorer=4"]:
        assert text in scorer
        assert text not in learner
    assert f"exec {sys.executable} -m distributed.cli.dask_worker" in learner, "signals reach the worker"
    assert "DASK_ISGD__CLUSTER__LEARNER_THREADS=2" in learner
    for script in (learner, scorer):  # HTCondor wants it quoted once more
        assert EXPORT in script or "PRE_SPAWN_ENVIRON=" in script
    assert re.findall(r"--memory-limit (\S+?)'?\"?\n", learner) == ["0"], "the queue's limit holds"


def test_a_scorers_places_are_its_threads():
    _, scorer = scripts("SLURMCluster", {}, processes=2)
    assert "--nworkers 2" in scorer
    assert "--nthreads 2" in scorer
    assert "--resources scorer=2" in scorer


def test_a_learner_of_one_core_has_a_thread_to_spare():
    learner, _ = scripts("SLURMCluster", {"cores": 1})
    assert learner.rindex("--nthreads 2") > learner.index("--nthreads 1")
    assert "LEARNER_THREADS=1" in learner


def test_workers_arguments_are_kept():
    learner, scorer = scripts(
        "SLURMCluster",
        {"worker_extra_args": ["--lifetime", "1h"]},
        worker_extra_args=["--lifetime", "50m", "--lifetime-stagger", "5m"],
    )
    assert "--lifetime 1h --resources learner=1" in learner
    assert "stagger" not in learner
    assert "--lifetime 50m --lifetime-stagger 5m --resources scorer=4" in scorer


def test_a_class_is_made_once_and_is_dask_jobqueues():
    assert clusters.SLURMCluster is with_learner(dask_jobqueue.SLURMCluster)
    assert issubclass(clusters.SLURMCluster, dask_jobqueue.SLURMCluster)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": {"processes": 2}}, "a learner is one process"),
        ({"learners": 0}, "learners: got 0"),
        ({"learner": {"quue": "gpu"}}, "did you mean 'queue'"),
    ],
)
def test_what_is_refused(options, message):
    async def made() -> None:
        clusters.SLURMCluster(cores=1, memory="1GB", asynchronous=True, **options)

    with pytest.raises(ConfigError, match=message):
        asyncio.run(made())

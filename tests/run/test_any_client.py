"""``fit`` works on any client: with resources, without, and on a single worker, where nothing is scored."""

from __future__ import annotations

import ast
import dataclasses
import logging

import pytest
from conftest import MODEL
from distributed import Client, LocalCluster

import dask_isgd as isgd
from dask_isgd.checks.cluster import wait_for_workers
from dask_isgd.errors import NoLearnerWorkerError
from dask_isgd.runtime.placement import coordinator_placement, learner_placement

pytestmark = pytest.mark.cluster

WAIT = 120
LEARNING = isgd.Learning(steps=200, batch_size=32, publish_every=20, report_every=10, threads=1)
OPEN = isgd.Sampling(gate="open")


def scored_on(client: Client, run: isgd.Run) -> set[str]:
    return {r["worker"] for r in client.get_task_stream(count=10_000) if f"score-{run.id}" in str(r["key"])}


@pytest.mark.parametrize("workers", [2, 1])
def test_a_plain_client_keeps_scorers_off_the_learner_where_it_can(digits, run_dir, workers, caplog):
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=2, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster,
        Client(cluster) as client,
        caplog.at_level(logging.WARNING, "dask_isgd"),
    ):
        client.get_task_stream(count=1)
        # long enough that a worker that has not imported torch yet scores before the run ends
        learning = dataclasses.replace(LEARNING, steps=3000)
        run = isgd.fit(client, MODEL, digits, run_dir, learning=learning, sampling=OPEN if workers > 1 else None)
        summary = run.wait(timeout=WAIT)
        assert summary["steps"] == 3000
        learner, scorers = run.latest["learner"], scored_on(client, run)
        if workers == 1:
            assert not scorers, "weights come from the learner's own minibatches"
            assert run.latest["gate"] == 1.0
            assert summary["gain"] > 1.5
            assert not caplog.text, "nothing is missing"
        else:
            assert scorers
            # tasks submitted before the learner was first heard of may have run anywhere
            late = [
                r["worker"]
                for r in client.get_task_stream(count=10_000)
                if f"score-{run.id}" in str(r["key"]) and ast.literal_eval(str(r["key"]))[3] > 40
            ]
            assert learner not in late


@pytest.mark.parametrize(
    ("workers", "learner", "coordinator"),
    [
        pytest.param(
            {"a": {"nthreads": 2, "resources": {"learner": 1}}, "b": {"nthreads": 1, "resources": {"scorer": 1}}},
            {"resources": {"learner": 1}},
            {"workers": ["b"], "allow_other_workers": True},
            id="resources pin the learner",
        ),
        pytest.param(
            {"a": {"nthreads": 2, "resources": {}}, "b": {"nthreads": 4, "resources": {}}},
            {"workers": ["b"], "allow_other_workers": True},
            {"workers": ["a"], "allow_other_workers": True},
            id="without them the worker with most threads, softly",
        ),
        pytest.param(
            {"a": {"nthreads": 2, "resources": {"scorer": 1}}, "b": {"nthreads": 1, "resources": {}}},
            {"workers": ["b"], "allow_other_workers": True},
            {"workers": ["a"], "allow_other_workers": True},
            id="declared scorers are left to scoring",
        ),
        pytest.param(
            {"a": {"nthreads": 1, "resources": {}}},
            {"workers": ["a"], "allow_other_workers": True},
            {},
            id="one worker does it all",
        ),
    ],
)
def test_who_does_what(workers, learner, coordinator):
    assert learner_placement(workers) == learner
    assert coordinator_placement(workers, learner) == coordinator


def test_a_cluster_of_scorers_only_is_refused_in_time(monkeypatch):
    import dask

    with (
        dask.config.set({"isgd.cluster.timeout": "1s"}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", resources={"scorer": 1}
        ) as cluster,
        Client(cluster) as client,
        pytest.raises(NoLearnerWorkerError, match="--resources 'learner=1'"),
    ):
        wait_for_workers(client)

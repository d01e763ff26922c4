"""A cluster of processes: scaling counts scorers, the learner stays, what is lost comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import dask
import pytest
from distributed import Client

import dask_isgd as isgd
from dask_isgd.clusters.scorer_controller import ScorerController
from dask_isgd.errors import ConfigError
from dask_isgd.events import Ended, Progress

WAIT = 60


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def present(client: Client) -> dict[str, str]:
    """Addresses by name."""
    return {str(w["name"]): a for a, w in client.scheduler_info(n_workers=-1)["workers"].items()}


def test_scale_counts_scorers_and_lost_workers_come_back():
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "0.5s"}),
        isgd.LocalCluster(1) as cluster,
        cluster.get_client() as client,
    ):
        learner = present(client)["learner"]
        cluster.scale(2)
        until(lambda: present(client).keys() == {"learner", "scorer-0", "scorer-1"}, "two scorers")
        cluster.scale(0)
        until(lambda: present(client) == {"learner": learner}, "the learner alone, and the same one")

        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.close_worker(learner))
        until(lambda: present(client).get("learner", learner) != learner, "another learner")


def test_a_nanny_that_restarts_its_worker_is_not_replaced_however_slow_the_machine(monkeypatch):
    monkeypatch.setattr("dask_isgd.clusters.base._PATIENCE", 10**6)

    with isgd.LocalCluster(1) as cluster, cluster.get_client() as client:
        nanny, (address,) = cluster.workers["learner"], present(client).values()
        pid = client.run(os.getpid)[address]
        with dask.config.set({"distributed.deploy.lost-worker-timeout": "0.2s"}):  # a start takes a second or more
            os.kill(pid, signal.SIGKILL)
            until(lambda: present(client).get("learner", address) != address, "the worker, restarted")
        assert cluster.workers["learner"] is nanny
        assert cluster.workers["learner"].pid != pid


def test_adapt_follows_the_controller_and_leaves_the_learner():
    class Fixed(ScorerController):
        number = 2

        def target(self, now, scorers, reports):
            return self.number

    controller = Fixed()
    with isgd.LocalCluster(1) as cluster, cluster.get_client() as client:
        learner = present(client)["learner"]
        adaptive = cluster.adapt(minimum=0, maximum=2, interval="50ms", wait_count=2, controller=controller)
        values = {"gain": 1.5, "ideal_gain": 2.0}
        event = Progress(run="a", incarnation=1, step=1, address="tcp://a", open=True, values=values)
        client.log_event("isgd-a", event.record())
        until(lambda: present(client).keys() == {"learner", "scorer-0", "scorer-1"}, "up")
        controller.number = 0
        until(lambda: present(client) == {"learner": learner}, "down")
        assert [(report.open, report.gain, report.ideal) for report in adaptive._listener.reports()] == [
            (True, 1.5, 2.0)
        ]
        ended = Ended(run="a", incarnation=1, attempt=1, role="learner", outcome="left", step=1)
        client.log_event("isgd-a", ended.record())
        until(lambda: not adaptive._listener.reports(), "the run has ended")


def test_each_process_sees_one_gpu():
    def sees() -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    with isgd.LocalCluster(3, gpus=[4, 7]) as cluster, cluster.get_client() as client:
        found = client.run(sees)
        assert {name: found[address] for name, address in present(client).items()} == {
            "learner": "4",
            "scorer-0": "7",
            "scorer-1": "4",
        }


def test_the_gpus_that_may_be_seen_are_shared_out(monkeypatch):
    from dask_isgd.clusters.local import visible_gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8932f937")
    assert visible_gpus() == ["2", "GPU-8932f937"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


@pytest.mark.parametrize("options", [{"n_workers": 0}, {"n_workers": 1, "learners": 2}, {"learners": 0}])
def test_impossible_numbers(options):
    with pytest.raises(ConfigError, match="wanted at least one learner"):
        isgd.LocalCluster(**options)

"""A run that is resumed while an earlier start of it still runs: the newest start has it, and nothing is lost."""

from __future__ import annotations

import pytest
from distributed import Client
from harness import WAIT, committed, fit, learning, lowest_step, no_gaps, reaches, saved, until

import dask_isgd as isgd
from dask_isgd.errors import LeaseLostError

pytestmark = pytest.mark.cluster

RARE = learning(checkpoint_steps=10**6)


@pytest.mark.parametrize("how", ["running", "paused"])
def test_another_client_of_the_cluster_takes_over_a_detached_run_and_loses_no_step(client, digits, run_dir, how):
    first = fit(client, digits, run_dir, learning=RARE, detach=True)
    until(first, reaches(60))
    if how == "paused":
        first.pause()
        until(first, lambda latest: first.status == "paused")
    step = first.latest["step"]
    with Client(client.scheduler.address) as other:
        second = fit(other, digits, run_dir, learning=RARE, resume=True)
        until(second, reaches(step + 50, incarnation=2))
        assert lowest_step(second, 2) >= step
        with pytest.raises(LeaseLostError, match="taken over"):
            first.wait(timeout=WAIT)
        assert second.stop(timeout=WAIT) == "stopped"
        assert committed(second) >= second.latest["step"]
        no_gaps(second)


def test_of_two_clusters_the_newest_start_wins_and_obeys_and_the_loser_hears_it(client, digits, run_dir):
    first = fit(client, digits, run_dir)
    until(first, saved(first))
    with isgd.LocalCluster(1, name="other") as cluster, cluster.get_client() as other:
        second = fit(other, digits, run_dir, resume=True)
        with pytest.raises(LeaseLostError, match="taken over"):
            first.wait(timeout=WAIT)
        first._monitor.wait_for_coordinator(float("inf"))  # it ends too
        until(second, reaches(committed(second) + 50, incarnation=2))
        assert second.stop(timeout=WAIT) == "stopped"
        no_gaps(second)

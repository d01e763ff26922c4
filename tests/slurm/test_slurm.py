"""On a real queue: workers are jobs, the learner's job differs from the others, and a run survives its end.

Everything runs on one machine, so these tests show how jobs are handled, not how fast they are.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import zarr
from conftest import MODEL
from distributed import Client, Security
from local_slurm import LocalSlurm, unavailable

import dask_isgd as isgd
from dask_isgd import clusters

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

WAIT = 150
ENDLESS = isgd.Learning(
    steps=10_000_000, batch_size=32, publish_every=20, report_every=10, threads=1, checkpoint_seconds=1
)
OPEN = isgd.Sampling(gate="open")
IMPATIENT = {"distributed.deploy.lost-worker-timeout": "2s", "isgd.cluster.timeout": "60s"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    reason = unavailable()
    if reason is not None:
        pytest.skip(f"no Slurm: {reason}")
    with LocalSlurm() as running:
        yield running


@contextmanager
def queue(logs: Path, **changes: Any) -> Iterator[tuple[Any, Client]]:
    """Yield a cluster on the Slurm of these tests, and its client once the learner's job has arrived."""
    learner = {"queue": "learner", "job_extra_directives": ["--gres=gpu:1"], **changes.pop("learner", {})}
    options: dict[str, Any] = {
        "queue": "scorer",
        "cores": 1,
        "memory": "2GB",
        "walltime": "00:10:00",
        "log_directory": str(logs),
        "local_directory": str(logs),
        "scheduler_options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
        "n_workers": 1,
        "learner": learner,
    }
    with (
        dask.config.set(IMPATIENT),
        clusters.SLURMCluster(**{**options, **changes}) as cluster,
        cluster.get_client() as client,
    ):
        until(lambda: "learner" in present(client), "the learner's job has arrived", logs)
        yield cluster, client


def present(client: Client) -> dict[str, dict[str, Any]]:
    return {str(w["name"]): w for w in client.scheduler_info(n_workers=-1)["workers"].values()}


def until(condition: Callable[[], Any], what: str, logs: Path | None = None, seconds: float = WAIT) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            logged = "\n".join(p.read_text()[-800:] for p in sorted(logs.glob("*.err"))) if logs else ""
            pytest.fail(f"not within {seconds:g} s: {what}\n{logged}")
        time.sleep(0.1)
    return found


def on_workers(client: Client) -> dict[str, dict[str, str]]:
    """Return parts of the environment of every worker's job, by the worker's name."""

    def environment(dask_worker: Any) -> dict[str, str]:
        return {
            "name": str(dask_worker.name),
            **{k: v for k, v in os.environ.items() if k.startswith(("SLURM", "CUDA"))},
        }

    return {found["name"]: found for found in client.run(environment).values()}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def test_workers_are_jobs_and_scaling_leaves_the_learners_alone(slurm: LocalSlurm, logs):
    with queue(logs) as (cluster, client):
        cluster.scale(2)
        until(lambda: len(present(client)) == 3, "two scorers and a learner", logs)
        (learner,) = cluster.job_id("learner")
        found = on_workers(client)
        jobs = {name: e["SLURM_JOB_ID"] for name, e in found.items()}
        assert sorted(jobs.values()) == sorted(slurm.jobs())
        assert jobs["learner"] == learner
        assert found["learner"]["SLURM_JOB_PARTITION"] == "learner"
        assert found["learner"]["CUDA_VISIBLE_DEVICES"] == "0"
        for name in found.keys() - {"learner"}:
            assert found[name]["SLURM_JOB_PARTITION"] == "scorer"
            assert not found[name].get("CUDA_VISIBLE_DEVICES")
        assert slurm.show(learner)["TimeLimit"] == "00:10:00"
        resources = {name: worker["resources"] for name, worker in present(client).items()}
        assert resources.pop("learner") == {"learner": 1}
        assert list(resources.values()) == [{"scorer": 1}] * 2

        cluster.scale(0)
        until(lambda: list(present(client)) == ["learner"], "no scorers", logs)
        until(lambda: slurm.jobs() == [learner], "their jobs have left the queue", logs)
    until(lambda: slurm.jobs() == [], "a closed cluster leaves no job", logs)


def test_a_run_trains_and_its_learners_job_may_be_cancelled(slurm: LocalSlurm, logs, digits, run_dir):
    """After scancel the learner commits in its grace period, and a new job resumes from exactly that step."""
    with queue(logs) as (cluster, client):
        run = isgd.fit(client, MODEL, digits, run_dir, learning=ENDLESS, sampling=OPEN)
        until(lambda: run.latest.get("examples_scored", 0) and run.latest["step"] > 50, "scores and steps", logs)
        (first,) = cluster.job_id("learner")
        slurm.run("scancel", first)
        (second,) = until(lambda: [j for j in cluster.job_id("learner") if j != first], "a new learner's job", logs)
        until(lambda: run.latest.get("incarnation") == 2, "a second incarnation", logs)
        resumed_at = run.latest["step"]
        until(lambda: run.latest["step"] > resumed_at, "further steps", logs)
        assert run.stop(timeout=WAIT) == "stopped"
        assert slurm.show(first)["JobState"] == "CANCELLED"
        assert slurm.show(second)["JobState"] == "RUNNING"
    assert steps_lost(run) == 0, "the learner had its grace period"


def resumes_in_the_next_job(slurm: LocalSlurm, logs: Path, data: Any, run_dir: Path, learner: dict[str, Any]) -> str:
    """Check that a learner whose job ends resumes in the next job without a lost step; return the first job's state."""
    with queue(logs, learner=learner) as (cluster, client):
        run = isgd.fit(client, MODEL, data, run_dir, learning=ENDLESS, sampling=OPEN)
        (first,) = cluster.job_id("learner")
        until(lambda: run.latest["step"] > 50, "the first steps", logs)
        began = run.latest["incarnation"]
        until(lambda: run.latest["incarnation"] > began, "another incarnation", logs)
        resumed_at = run.latest["step"]
        until(lambda: run.latest["step"] > resumed_at, "further steps", logs)
        assert cluster.job_id("learner") != [first]
        state = slurm.show(first)["JobState"]
        run.stop(timeout=WAIT)
    assert steps_lost(run) == 0
    return state


def test_a_learner_that_reaches_its_lifetime_resumes_in_the_next_job(slurm: LocalSlurm, logs, digits, run_dir):
    resumes_in_the_next_job(slurm, logs, digits, run_dir, {"worker_extra_args": ["--lifetime", "40s"]})


def test_a_learner_that_slurm_warns_before_its_walltime_resumes_in_the_next_job(
    slurm: LocalSlurm, logs, digits, run_dir
):
    """``--signal=B:TERM@60``: Slurm sends the signal at most a minute early, and counts a walltime in minutes."""
    warned = {"walltime": "00:02:00", "job_extra_directives": ["--gres=gpu:1", "--signal=B:TERM@60"]}
    assert resumes_in_the_next_job(slurm, logs, digits, run_dir, warned) != "TIMEOUT", (
        "it left before its time was over"
    )


def test_a_learner_whose_node_goes_down_resumes_on_another(slurm: LocalSlurm, logs, digits, run_dir):
    """No process of its jobs or of Slurm runs there any more. Only the steps since a checkpoint are lost."""
    with queue(logs) as (cluster, client):
        run = isgd.fit(client, MODEL, digits, run_dir, learning=ENDLESS, sampling=OPEN)
        (first,) = cluster.job_id("learner")
        node = slurm.show(first)["NodeList"]
        until(lambda: list(run.directory.checkpoints().names()), "a checkpoint", logs)
        try:
            slurm.power_off(node)
            until(lambda: run.latest.get("incarnation") == 2, "a second incarnation", logs)
            resumed_at = run.latest["step"]
            until(lambda: run.latest["step"] > resumed_at, "further steps", logs)
            (second,) = cluster.job_id("learner")
            assert slurm.show(second)["NodeList"] not in (node, "(null)")
            run.stop(timeout=WAIT)
        finally:
            slurm.power_on(node)
    _, (start, _) = incarnations(run)
    assert start > 0, "from a checkpoint, not from the beginning"


def test_adapt_up_and_down_without_touching_the_learner(slurm: LocalSlurm, logs, digits, run_dir):
    class Fixed(clusters.ScorerController):
        """A controller that the test sets."""

        number = 2

        def target(self, now, scorers, reports):
            return self.number

    controller = Fixed()
    with queue(logs, n_workers=0) as (cluster, client):
        (learner,) = cluster.job_id("learner")
        cluster.adapt(minimum=0, maximum=2, interval="200ms", wait_count=2, controller=controller)
        run = isgd.fit(client, MODEL, digits, run_dir, learning=ENDLESS, sampling=OPEN)
        until(lambda: len(present(client)) == 3, "up to two scorers", logs)
        until(lambda: run.latest.get("examples_scored", 0), "scores", logs)
        controller.number = 0
        until(lambda: list(present(client)) == ["learner"], "down to none", logs)
        controller.number = 1
        until(lambda: len(present(client)) == 2, "up again", logs)
        assert cluster.job_id("learner") == [learner]
        assert run.latest["incarnation"] == 1, "the learner was never started again"
        run.stop(timeout=WAIT)


def test_a_scorers_job_that_is_cancelled_is_replaced_and_jobs_use_tls(slurm: LocalSlurm, logs):
    with queue(logs, security=Security.temporary(), shared_temp_directory=str(logs)) as (cluster, client):
        (first,) = until(lambda: len(present(client)) == 2 and cluster.job_id("scorer"), "a scorer", logs)
        slurm.run("scancel", first)
        until(lambda: cluster.job_id("scorer") not in ([], [first]), "another job", logs)
        until(lambda: len(present(client)) == 2, "another scorer", logs)
        addresses = [client.scheduler.address, *client.scheduler_info(n_workers=-1)["workers"]]
        assert all(address.startswith("tls://") for address in addresses)
        assert len(list(logs.glob(".dask-jobqueue.worker.*"))) == 3, "the certificate, its key and authority"
    assert not list(logs.glob(".dask-jobqueue.worker.*")), "no key outlives its cluster"


def incarnations(run: isgd.Run) -> list[tuple[int, int]]:
    """Return, for each incarnation of the learner, the step it started from and the last it reported (-1: none)."""
    root = zarr.open_group(str(run.directory.history), mode="r")
    learners = [group for name, group in sorted(root.groups()) if name.startswith("learner")]
    return [(int(g.attrs["start_step"]), int(np.nanmax(g["reports"][:, -1], initial=-1))) for g in learners]


def steps_lost(run: isgd.Run) -> int:
    """Return the largest number of steps that one incarnation reported and the next had to repeat."""
    found = incarnations(run)
    assert len(found) >= 2
    assert found[0][1] > 0
    return max(max(0, end - start) for (_, end), (start, _) in itertools.pairwise(found))


def test_the_command_trains_on_slurm_by_the_example(slurm: LocalSlurm, tmp_path):
    """``dask isgd train digits --cluster slurm.yaml`` with the unchanged file from ``examples``."""
    example = Path(__file__).parents[2] / "examples" / "clusters" / "slurm.yaml"
    command = [sys.executable, "-m", "dask_isgd", "train", "digits", "--steps", "300", "--json"]
    files = ["--cluster", str(example), "--run", str(tmp_path / "run"), "--data", str(tmp_path / "digits.zarr")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 300
    assert summary["examples_scored"] > 0
    until(lambda: slurm.jobs() == [], "the command leaves no job")

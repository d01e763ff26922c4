"""Fault 8: what becomes of a run whose client dies, and who can find it again."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest
from harness import WAIT, committed, fit, kill, learning, no_gaps, process, reaches, until

import dask_isgd as isgd
from dask_isgd.errors import ConfigError

pytestmark = pytest.mark.cluster

CLIENT = """
import sys, time
from pathlib import Path
from distributed import Client
from harness import fit
from dask_isgd.storage import Dataset

address, data, run_dir, detach = sys.argv[1:]
if __name__ == "__main__":
    with Client(address) as client:
        run = fit(client, Dataset(data, group="train"), run_dir, detach=detach == "detached")
        Path(run_dir + ".started").touch()
        run.wait()
"""


def started(client, digits, run_dir, how: str):
    """A run whose client is another process, seen by this one once it trains."""
    script = run_dir.parent / "client.py"
    script.write_text(CLIENT)
    url = str(digits.url).removesuffix("/train")
    context = process(str(script), client.scheduler.address, url, str(run_dir), how)
    other = context.__enter__()
    mark = run_dir.with_name(run_dir.name + ".started")
    deadline = time.monotonic() + WAIT
    while not mark.exists():
        assert other.poll() is None, other.stdout.read()
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
    run = isgd.attach(client, run_dir)
    until(run, reaches(60))
    return context, other, run


def test_the_run_of_a_client_that_dies_checkpoints_and_stops(client, digits, run_dir, capsys):
    context, other, run = started(client, digits, run_dir, "owned")
    with_step = run.latest["step"]
    other.kill()
    seconds = until_ended(run)
    with capsys.disabled():
        print(f"\nclient killed: stopped after {seconds:.1f} s")
    context.__exit__(None, None, None)
    assert run.status == "stopped"
    assert committed(run) >= with_step  # not a step was lost: the learner had time to commit
    again = fit(client, digits, run_dir, resume=True, learning=learning(steps=committed(run) + 50))
    again.wait(timeout=WAIT)
    no_gaps(again)


def until_ended(run: isgd.Run) -> float:
    began = time.monotonic()
    for _ in run.watch(WAIT):
        pass
    return time.monotonic() - began


def test_a_detached_run_outlives_its_client_and_is_found_by_another(client, digits, run_dir):
    context, other, run = started(client, digits, run_dir, "detached")
    other.kill()
    other.wait(WAIT)
    context.__exit__(None, None, None)
    step = run.latest["step"]
    until(run, reaches(step + 200))
    later = isgd.attach(client, run_dir)
    assert later.status == "running"
    with pytest.raises(ConfigError, match="pass it: attach"):
        later.model()
    later.pause()
    until(later, lambda latest: later.status == "paused")
    later.unpause()
    until(later, reaches(run.latest["step"] + 50))
    assert later.stop(timeout=WAIT) == "stopped"
    assert run.status == "stopped"
    no_gaps(later)


INTERRUPTED = """
import sys
from distributed import Client
from harness import fit
from dask_isgd.storage import Dataset

address, data, run_dir, seconds = sys.argv[1:]
if __name__ == "__main__":
    with Client(address) as client:
        run = fit(client, Dataset(data, group="train"), run_dir)
        try:
            run.wait(progress=lambda latest: print(latest["step"], flush=True), second_interrupt=float(seconds))
        except KeyboardInterrupt:
            print("interrupted", run.status, flush=True)
"""


@pytest.mark.parametrize(("interrupts", "status"), [(1, "running"), (2, "stopped")])
def test_the_first_interrupt_stops_the_waiting_the_second_the_run(client, digits, run_dir, interrupts, status):
    script = run_dir.parent / "interrupted.py"
    script.write_text(INTERRUPTED)
    url, window = str(digits.url).removesuffix("/train"), {1: "0.5", 2: "60"}[interrupts]
    with process(str(script), client.scheduler.address, url, str(run_dir), window) as other:
        lines = iter(other.stdout)
        assert any(line.strip().isdigit() and int(line) > 50 for line in lines)
        other.send_signal(signal.SIGINT)
        if interrupts == 2:
            assert any("Ctrl-C again" in line for line in lines)
            other.send_signal(signal.SIGINT)
        assert any(line == f"interrupted {status}\n" for line in lines)
        assert other.wait(WAIT) == 0


@contextlib.contextmanager
def command(run_dir, *arguments: str):
    """The command line's run, once its learner has begun."""
    steps = ("--steps", "1000000")
    with process("-m", "dask_isgd", "train", "digits", "--run", str(run_dir), *steps, *arguments) as other:
        deadline = time.monotonic() + WAIT
        while not any((run_dir / "leases").glob("learner-*.json")):
            assert other.poll() is None, other.stdout.read()
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        yield other


@pytest.mark.parametrize("interrupts", [1, 2])
def test_the_command_lines_first_interrupt_leaves_the_run_to_the_cluster_the_second_stops_it(
    client, digits, run_dir, interrupts
):
    url = str(digits.url).removesuffix("/train")
    with command(run_dir, "--scheduler", client.scheduler.address, "--data", url) as other:
        run = isgd.attach(client, run_dir)
        until(run, reaches(60))
        other.send_signal(signal.SIGINT)
        said = next(line for line in other.stdout if "Ctrl-C again" in line)
        assert f"`dask isgd status {run_dir} --watch`, `dask isgd stop {run_dir}`" in said
        if interrupts == 2:
            other.send_signal(signal.SIGINT)
            assert any(line.startswith("stopped; resume with") for line in other.stdout)
        assert other.wait(WAIT) == 128 + signal.SIGINT
    if interrupts == 1:
        until(run, reaches(run.latest["step"] + 200))
        with process("-m", "dask_isgd", "stop", str(run_dir)) as stopping:
            assert "was asked to stop" in stopping.stdout.read()
        for _ in run.watch(WAIT):
            pass
    assert run.status == "stopped"
    assert committed(run) >= run.latest["step"]  # not a step was lost


@pytest.mark.slow  # a cluster of its own, and an interrupt that is waited out
def test_a_command_that_is_its_cluster_forgives_one_interrupt_and_stops_at_two(client, run_dir, tmp_path):
    with command(run_dir, "--workers", "2", "--data", str(tmp_path / "d.zarr")) as other:
        lines = iter(other.stdout)
        other.send_signal(signal.SIGINT)
        assert any("Ctrl-C again" in line for line in lines)
        assert any(line.startswith("training") for line in lines)  # it is shown again
        other.send_signal(signal.SIGINT)
        assert any("Ctrl-C again" in line for line in lines)
        other.send_signal(signal.SIGINT)
        assert any(line.startswith("stopped; resume with") for line in lines)
        assert other.wait(WAIT) == 128 + signal.SIGINT
    run = isgd.attach(client, run_dir)
    steps = run.history.step.values
    assert steps[-1] <= committed(run) < steps[-1] + 20  # reports come every 20 steps: none was lost


def test_a_client_that_owns_its_cluster_takes_it_along_and_the_checkpoint_stays(client, digits, run_dir):
    script = run_dir.parent / "owner.py"
    script.write_text(
        CLIENT.replace(
            "with Client(address) as client:", "with isgd.LocalCluster(2) as c, c.get_client() as client:"
        ).replace("import sys, time", "import sys\nimport dask_isgd as isgd")
    )
    url = str(digits.url).removesuffix("/train")
    with process(str(script), "-", url, str(run_dir), "owned") as other:
        deadline = time.monotonic() + WAIT
        while (
            not (run_dir / "checkpoints").exists() or not isgd.attach(client, run_dir).directory.checkpoints().names()
        ):
            assert other.poll() is None, other.stdout.read()
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        kill(other.pid)
        other.wait(WAIT)
    kept = committed(isgd.attach(client, run_dir))
    again = fit(client, digits, run_dir, resume=True, learning=learning(steps=kept + 50))
    again.wait(timeout=WAIT)
    assert kept >= 50
    no_gaps(again)

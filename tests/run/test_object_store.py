"""A whole run in an object store: trained, killed, resumed, looked at, and nothing secret told."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import icechunk
import pytest
import xarray as xr
import zarr
from conftest import MODEL, SECRET, Home
from distributed import Client
from obspec_utils.registry import ObjectStoreRegistry
from obstore.store import LocalStore
from virtualizarr.parsers import HDFParser

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.config import to_mapping
from dask_isgd.errors import ConfigError, RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.events import topic_of
from dask_isgd.pipelines.commands import show
from dask_isgd.storage import Dataset

WAIT = 120
ROOT = str(Path(isgd.__file__).absolute().parents[1])


def learning(**changes) -> isgd.Learning:
    settings = {"batch_size": 32, "publish_every": 20, "report_every": 10, "checkpoint_steps": 50, "threads": 1}
    return isgd.Learning(**{**settings, "evaluate_every": 10**9, **changes})


def until(run: isgd.Run, condition) -> None:
    assert any(condition(latest) for latest in run.watch(WAIT)), f"{run.status}: {run.latest}"


def test_a_run_survives_the_death_of_its_learner_and_is_resumed(client: Client, digits: Dataset, s3: Home, caplog):
    options = {"storage_options": s3.options}
    open_gate = isgd.Sampling(gate="open")
    with caplog.at_level(logging.INFO):
        run = isgd.fit(client, MODEL, digits, s3.url, learning=learning(steps=10**7), sampling=open_gate, **options)
        checkpoints, leases = run.directory.checkpoints(), run.directory.leases()
        until(run, lambda latest: checkpoints.names() and latest.get("examples_scored", 0) > 0)
        kept = checkpoints.latest().step
        os.kill(leases.owner(leases.highest())["pid"], signal.SIGKILL)
        until(run, lambda latest: latest.get("incarnation") == 2 and latest["step"] > kept)
        run.pause()
        until(run, lambda latest: run.status == "paused")
        assert run.stop(timeout=WAIT) == "stopped"
    last = checkpoints.latest()
    assert last.step > kept >= 50
    assert 1 <= len(checkpoints.names()) <= 2

    with pytest.raises(RunExistsError, match="resume=True"):
        isgd.fit(client, MODEL, digits, s3.url, learning=learning(steps=10), **options)
    resumed = isgd.fit(
        client,
        MODEL,
        digits,
        s3.url,
        learning=learning(steps=last.step + 30),
        sampling=open_gate,
        resume=True,
        **options,
    )
    summary = resumed.wait(timeout=WAIT)
    assert (summary["run"], summary["steps"], resumed.status) == (s3.url, last.step + 30, "finished")
    steps = resumed.history.step.values.tolist()
    assert steps == sorted(set(steps))
    assert resumed.history.incarnation.values[-1] == 3

    attached = isgd.attach(client, s3.url, MODEL, storage_options=s3.options)
    assert attached.directory.checkpoints().latest().state["finished"]
    assert attached.model() is not None
    hardest = attached.hardest(3, digits)
    assert len(hardest) == 3

    told = [repr(x) for x in (run, run.directory, checkpoints, leases, resumed.document, summary)]
    told += [json.dumps(event) for _, event in client.get_events(topic_of(run.id))]
    told += [str(logs) for logs in (client.get_scheduler_logs(), client.get_worker_logs(), caplog.text)]
    told += [s3.folder.read(name).decode("latin-1") for name in s3.all]
    assert [text for text in told if SECRET in text] == []


def test_a_run_trains_on_a_snapshot_and_resumes_with_no_other(client: Client, digits: Dataset, tmp_path: Path):
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
    for commit in ("first", "second"):
        session = repository.writable_session("main")
        group = zarr.open_group(session.store, mode="a")
        group.attrs["commit"] = commit
        if commit == "first":
            for name, array in digits.arrays.items():
                names = array.metadata.dimension_names
                values = array[:] if name == "label" else array[:].astype("f4") / 16
                group.create_array(name, data=values, chunks=array.chunks, dimension_names=names)
        session.commit(commit)
    second, first = list(repository.ancestry(branch="main"))[:2]
    old = Dataset(repository.readonly_session(snapshot_id=first.id).store, target="label")
    run = isgd.fit(client, MODEL, old, tmp_path / "run", learning=learning(steps=40))
    assert run.wait(timeout=WAIT)["steps"] == 40
    assert run.document["data"]["snapshot"] == first.id
    new = Dataset(repository.readonly_session(snapshot_id=second.id).store, target="label")
    with pytest.raises(RunMismatchError, match="data"):
        isgd.fit(client, MODEL, new, tmp_path / "run", learning=learning(steps=80), resume=True)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")  # what netCDF compresses with is none of Zarr 3's own
def test_a_run_trains_on_references_to_a_netcdf_file(client: Client, digits: Dataset, tmp_path: Path):
    rows = digits.load()
    image = rows.inputs[0].astype("f4") / 16
    data = xr.Dataset({"image": (("sample", "x", "y"), image), "label": ("sample", rows.target)})
    encoding = {"image": {"chunksizes": (100, 8, 8), "zlib": True}, "label": {"chunksizes": (100,)}}
    data.to_netcdf(tmp_path / "digits.nc", engine="h5netcdf", encoding=encoding)
    registry = ObjectStoreRegistry({"file://": LocalStore()})
    references = HDFParser()(f"file://{tmp_path / 'digits.nc'}", registry)
    run = isgd.fit(client, MODEL, Dataset(references), tmp_path / "run", learning=learning(steps=10**7))
    until(run, lambda latest: latest["step"] >= 40 and latest.get("examples_scored", 0) > 0)
    assert run.stop(timeout=WAIT) == "stopped"


def test_a_spec_travels_with_its_options_and_shows_none(digits: Dataset, s3: Home):
    import pickle

    plan = prepare(
        RunRequest(model=MODEL, data=digits, run_dir=s3.url, learning=learning(steps=1), storage_options=s3.options)
    )
    create(plan)
    spec = pickle.loads(pickle.dumps(plan.spec))  # noqa: S301
    assert spec.directory.document()["run"] == spec.run
    assert spec.directory.open_weights().n == len(digits)
    assert SECRET not in repr(plan) + repr(spec) + repr(spec.directory) + json.dumps(to_mapping(spec.learning))


def test_wrong_places_are_refused_before_anything_starts(client: Client, digits: Dataset, s3: Home):
    for url, says in (("s3://no-such-bucket-here/run", "cannot be written"), (f"{s3.url}?key={SECRET}", "a query")):
        with pytest.raises(ConfigError, match=says) as caught:
            isgd.fit(client, MODEL, digits, url, learning=learning(steps=1), storage_options=s3.options)
        assert SECRET not in str(caught.value)
    with pytest.raises(RunNotFoundError, match="no run at s3://"):
        isgd.attach(client, s3.url, storage_options=s3.options)


@pytest.fixture
def credentials(s3: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment, as on a machine of a cloud."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.options["secret"])


def test_the_commands_take_a_url_and_the_credentials_of_the_environment(credentials, s3: Home, tmp_path: Path, capsys):
    command = [sys.executable, "-m", "dask_isgd", "train", "digits", "--run", s3.url, "--steps", "60", "--json"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    trained = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WAIT)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["run"] == s3.url
    assert s3.folder.read("summary.png").startswith(b"\x89PNG")
    assert SECRET not in trained.stdout + trained.stderr
    show.status(s3.url)
    assert re.search(r"finished(.|\n)*latest checkpoint step-000000060-i0001", capsys.readouterr().out)
    show.plot(s3.url, str(tmp_path / "here.html"))
    assert "<svg" in (tmp_path / "here.html").read_text()

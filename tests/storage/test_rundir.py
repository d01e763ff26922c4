"""Promises of RunDirectory: one run a directory, its small files whole, nothing foreign deleted."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dask_isgd.errors import ConfigError, LearnerFenced, RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.storage import RunDirectory, WeightArray

DOCUMENT = {"config": {"steps": 10}, "fingerprint": [1, 2]}


@pytest.fixture
def rundir(tmp_path):
    rundir = RunDirectory(tmp_path / "runs" / "first")
    rundir.create(DOCUMENT)
    return rundir


def fill(rundir):
    WeightArray.create(rundir.weights, 10, 5)
    rundir.checkpoints().commit(1, 1, {"a": np.ones(3)}, {})
    rundir.set_control(want="pause")


def test_a_new_run(rundir):
    assert rundir.exists()
    assert rundir.document() == {**DOCUMENT, "format_version": 1}
    assert rundir.name == "first"
    assert rundir.weights.endswith("runs/first/weights.zarr")
    assert rundir.history.endswith("runs/first/history.zarr")
    fill(rundir)
    assert rundir.leases("learner").acquire({}) == 1
    assert sorted(path.name for path in rundir.path.iterdir()) == [
        "checkpoints", "control.json", "leases", "run.json", "weights.zarr",
    ]  # fmt: skip
    manifest = rundir.path / "checkpoints" / "step-000000001-i0001" / "manifest.json"
    assert json.loads(manifest.read_text())["run"] == "first"


def test_nothing_there(tmp_path):
    rundir = RunDirectory(tmp_path / "nothing")
    assert not rundir.exists()
    assert rundir.control() == {"want": "run"}
    assert rundir.sweep() == []
    for call in (rundir.document, lambda: rundir.set_control(want="stop")):
        with pytest.raises(RunNotFoundError, match="no run at"):
            call()
    assert not rundir.path.exists()


def test_a_run_is_not_written_over(rundir):
    with pytest.raises(RunExistsError, match=r"resume=True.*overwrite=True"):
        rundir.create({})
    assert rundir.document()["config"] == {"steps": 10}


def test_overwrite_begins_anew_and_touches_nothing_foreign(rundir):
    fill(rundir)
    old = rundir.leases().acquire({})
    (rundir.path / "notes.txt").write_text("mine")
    rundir.create({"second": True}, overwrite=True)
    assert rundir.document() == {"second": True, "format_version": 1}
    assert sorted(path.name for path in rundir.path.iterdir()) == ["leases", "notes.txt", "run.json"]
    assert rundir.control() == {"want": "run"}
    assert rundir.leases().acquire({}) == old + 1
    with pytest.raises(LearnerFenced):  # a learner of the old run that still lives
        rundir.leases().check(old)


def test_overwrite_where_there_is_none(tmp_path):
    RunDirectory(tmp_path / "new").create({}, overwrite=True)
    assert RunDirectory(tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"kind": "another"}'])
def test_another_programs_run_json_is_left_alone(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    rundir = RunDirectory(tmp_path)
    with pytest.raises(RunNotFoundError, match=r"run\.json"):
        rundir.document()
    for overwrite in (False, True):
        with pytest.raises(RunExistsError):
            rundir.create({}, overwrite=overwrite)
    assert (tmp_path / "run.json").read_text() == text
    assert (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize("part", ["checkpoints", "weights.zarr", "history.zarr"])
def test_parts_without_a_run_are_left_alone(tmp_path, part):
    (tmp_path / part).mkdir()
    for overwrite in (False, True):
        with pytest.raises(RunExistsError, match=f"{part} and no run.json"):
            RunDirectory(tmp_path).create({}, overwrite=overwrite)


def test_another_format(rundir):
    path = rundir.path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(RunMismatchError, match="format_version 2, wanted 1"):
        rundir.document()
    rundir.create({}, overwrite=True)
    assert rundir.document() == {"format_version": 1}


def test_of_many_creators_one_wins(tmp_path):
    def create(i):
        try:
            RunDirectory(tmp_path / "run").create({"i": i})
        except RunExistsError:
            return None
        return i

    with ThreadPoolExecutor(8) as pool:
        won = [i for i in pool.map(create, range(40)) if i is not None]
    assert [RunDirectory(tmp_path / "run").document()["i"]] == won


def test_control(rundir):
    assert rundir.control() == {"want": "run"}
    rundir.set_control(want="pause", reason="lunch")
    rundir.set_control(want="stop")
    assert RunDirectory(rundir.url).control() == {"want": "stop", "reason": "lunch"}
    with pytest.raises(ValueError, match="wanted one of run, pause, stop"):
        rundir.set_control(want="halt")


def test_control_is_always_whole(rundir):
    with ThreadPoolExecutor(3) as pool:
        writer = pool.submit(lambda: [rundir.set_control(text=str(i % 10) * 5000) for i in range(100)])
        while not writer.done():
            text = rundir.control().get("text", "0" * 5000)
            assert text == text[0] * 5000
        writer.result()


def test_sweep(rundir):
    fill(rundir)
    leftovers = [
        rundir.path / ".run.json.a.partial",
        rundir.path / "checkpoints" / ".step-000000002-i0001.a.partial",
        rundir.path / "weights.zarr" / "weight" / "0.a.partial",
    ]
    for path in leftovers:
        path.touch()
    assert rundir.sweep() == []
    assert sorted(rundir.sweep(seconds=0)) == sorted(leftovers)
    assert rundir.checkpoints().latest().step == 1


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/run", "gs://bucket/run"])
def test_remote_ones_are_refused(url):
    with pytest.raises(ConfigError, match="://bucket/run, wanted a path") as caught:
        RunDirectory(url)
    assert "secret" not in str(caught.value)

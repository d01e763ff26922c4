"""Promises of RunDirectory: one run a directory, its small files whole, nothing foreign deleted."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dask_isgd.errors import ConfigError, LeaseLostError, RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.run.documents import FORMAT_VERSION

DOCUMENT = {"config": {"steps": 10}, "fingerprint": [1, 2]}


def open_home(home):
    return RunDirectory(home.url, storage_options=home.options)


@pytest.fixture
def rundir(home):
    rundir = open_home(home)
    rundir.create(DOCUMENT)
    return rundir


def fill(rundir):
    rundir.create_weights(10, 5)
    rundir.checkpoints().commit(1, 1, {"a": np.ones(3)}, {})
    rundir.set_control(want="pause")


def test_a_new_run(rundir):
    assert rundir.exists()
    assert rundir.document() == {**DOCUMENT, "format_version": FORMAT_VERSION}
    assert rundir.name == "run"
    assert rundir.weights.endswith("/run/weights.zarr")
    assert rundir.history.endswith("/run/history.zarr")
    fill(rundir)
    assert rundir.leases("learner").acquire({}).incarnation == 1
    assert rundir.folder.names() == ["checkpoints", "control.json", "leases", "run.json", "weights.zarr"]
    assert json.loads(rundir.folder.read("checkpoints/step-000000001-i0001/manifest.json"))["run"] == "run"


def test_nothing_there(home):
    rundir = open_home(home)
    assert not rundir.exists()
    assert rundir.control() == {"want": "run"}
    assert rundir.sweep() == []
    for call in (rundir.document, lambda: rundir.set_control(want="stop")):
        with pytest.raises(RunNotFoundError, match="no run at"):
            call()
    assert home.all == []


@pytest.mark.parametrize(
    "place", ["file", "file/below", "/proc/nothing/run"], ids=["file", "below a file", "unwritable"]
)
def test_a_place_where_nothing_can_be_created(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run directory .*: nothing can be created there: .*Choose another"):
        RunDirectory(tmp_path / place).former(resume=False, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_is_not_written_over(rundir):
    with pytest.raises(RunExistsError, match=r"resume=True.*overwrite=True"):
        rundir.create({})
    assert rundir.document()["config"] == {"steps": 10}


def test_overwrite_begins_anew_and_touches_nothing_foreign(rundir):
    fill(rundir)
    old = rundir.leases().acquire({})
    rundir.folder.replace("notes.txt", b"mine")
    rundir.create({"second": True}, overwrite=True)
    assert rundir.document() == {"second": True, "format_version": FORMAT_VERSION}
    assert rundir.folder.names() == ["leases", "notes.txt", "run.json"]
    assert rundir.control() == {"want": "run"}
    assert rundir.leases().acquire({}).incarnation == old.incarnation + 1
    with pytest.raises(LeaseLostError):  # a learner of the old run that still lives
        old.check()


def test_overwrite_where_there_is_none(home):
    open_home(home).create({}, overwrite=True)
    assert open_home(home).exists()


def test_remove_undoes_create(rundir, home):
    fill(rundir)
    rundir.remove()
    assert home.all == []
    assert not rundir.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": FORMAT_VERSION}', '{"kind": "another"}'])
def test_another_programs_run_json_is_left_alone(home, text):
    home.folder.replace("run.json", text.encode())
    home.folder.replace("checkpoints/theirs", b"")
    rundir = open_home(home)
    with pytest.raises(RunNotFoundError, match=r"run\.json"):
        rundir.document()
    for overwrite in (False, True):
        with pytest.raises(RunExistsError):
            rundir.create({}, overwrite=overwrite)
    assert home.folder.read("run.json") == text.encode()
    assert home.all == ["checkpoints/theirs", "run.json"]


@pytest.mark.parametrize("part", ["checkpoints", "weights.zarr", "history.zarr"])
def test_parts_without_a_run_are_left_alone(home, part):
    home.folder.replace(f"{part}/file", b"")
    for overwrite in (False, True):
        with pytest.raises(RunExistsError, match=f"{part} but no run.json"):
            open_home(home).create({}, overwrite=overwrite)


def test_another_format(rundir):
    document = {**json.loads(rundir.folder.read("run.json")), "format_version": 1}
    rundir.folder.replace("run.json", json.dumps(document).encode())
    with pytest.raises(RunMismatchError, match=rf"got format version 1, .* reads {FORMAT_VERSION}; use the version"):
        rundir.document()
    rundir.create({}, overwrite=True)
    assert rundir.document() == {"format_version": FORMAT_VERSION}


def test_of_many_creators_one_wins(home):
    def create(i):
        try:
            open_home(home).create({"i": i})
        except RunExistsError:
            return None
        return i

    with ThreadPoolExecutor(8) as pool:
        won = [i for i in pool.map(create, range(40)) if i is not None]
    assert [open_home(home).document()["i"]] == won


def test_control(rundir, home):
    assert rundir.control() == {"want": "run"}
    rundir.set_control(want="pause", reason="lunch")
    rundir.set_control(want="stop")
    assert open_home(home).control() == {"want": "stop", "reason": "lunch"}
    with pytest.raises(ValueError, match="wanted one of run, pause, stop"):
        rundir.set_control(want="halt")


def test_control_is_always_whole(rundir):
    with ThreadPoolExecutor(3) as pool:
        times = 100 if rundir.local else 10
        writer = pool.submit(lambda: [rundir.set_control(text=str(i % 10) * 5000) for i in range(times)])
        while not writer.done():
            text = rundir.control().get("text", "0" * 5000)
            assert text == text[0] * 5000
        writer.result()


@pytest.mark.parametrize("damage", ["absent", "half", "zarr.json", "other size", "none"])
def test_weights_are_repaired_and_whole_ones_left_alone(rundir, damage):
    if damage != "absent":
        rundir.create_weights(10, 4 if damage == "other size" else 5).write(
            0, np.ones(4 if damage == "other size" else 5)
        )
    if damage == "half":
        rundir.folder.remove("weights.zarr/weight")
    if damage == "zarr.json":
        rundir.folder.replace("weights.zarr/stamp/zarr.json", b"{}")
    rundir.repair_weights(10, 5)
    kept = np.isfinite(rundir.open_weights().read_all()).sum()
    assert kept == (5 if damage == "none" else 0)
    assert len(rundir.open_weights().read_stamps()) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"want": "halt"}', b'{"attempt": "x"}', b'{"attempt": -1}', b'{"attempt": 1e9}'],
)
def test_a_damaged_control_is_named_and_replaced_by_the_next_request(rundir, content):
    rundir.folder.replace("control.json", content)
    with pytest.raises(RunNotFoundError, match=r"control\.json is (damaged|not JSON).*Delete it"):
        rundir.control()
    assert rundir.attempt() == 0
    rundir.set_control(want="stop")
    assert rundir.control() == {"want": "stop"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": "x"}, "chunk: got 'x', wanted int"),
        ({"chunk": 0}, "chunk: got '0', wanted int"),
        ({"config": []}, r"config: got '\[\]', wanted dict"),
        ({"config": {"learning": {"steps": True}}}, "config.learning.steps: got 'True', wanted int"),
        ({}, "data: got nothing, wanted dict"),
    ],
)
def test_a_document_that_was_edited_by_hand_is_named(home, changes, message):
    rundir = open_home(home)
    rundir.create(changes)
    with pytest.raises(RunNotFoundError, match=rf"run\.json is damaged: .*{message}"):
        rundir.document("data")


def test_sweep_of_a_disk(tmp_path):
    rundir = RunDirectory(tmp_path / "run")
    rundir.create(DOCUMENT)
    fill(rundir)
    leftovers = [
        tmp_path / "run" / ".run.json.a.partial",
        tmp_path / "run" / "checkpoints" / ".step-000000002-i0001.a.partial",
        tmp_path / "run" / "weights.zarr" / "weight" / "0.a.partial",
    ]
    for path in leftovers:
        path.touch()
    assert rundir.sweep() == []
    assert sorted(rundir.sweep(seconds=0)) == sorted(map(str, leftovers))
    assert rundir.checkpoints().latest().step == 1


def test_sweep_of_a_store_takes_checkpoints_without_a_manifest(s3):
    rundir = open_home(s3)
    rundir.create(DOCUMENT)
    fill(rundir)
    before = s3.all
    rundir.folder.replace("checkpoints/step-000000002-i0001/tensors.safetensors", b"half")
    assert rundir.sweep() == []
    assert rundir.sweep(seconds=0) == [f"{s3.url}/checkpoints/step-000000002-i0001"]
    assert s3.all == before
    assert rundir.checkpoints().latest().step == 1


def test_history_and_weights(rundir):
    assert math.isnan(rundir.reported())
    fill(rundir)
    rundir.open_weights().write(1, np.arange(5))
    np.testing.assert_array_equal(rundir.open_weights().read_all(), [np.nan] * 5 + [0, 1, 2, 3, 4])
    for incarnation in (1, 2):  # another writer's group is seen at once
        attrs = {"incarnation": incarnation, "start_step": incarnation - 1}
        history = rundir.create_history(f"learner-{incarnation:04d}", ["loss"], 10, attrs=attrs)
        history.append({"step": incarnation, "loss": 0.5})
        history.flush()
        assert rundir.read_history().step.values.tolist() == list(range(1, incarnation + 1))
    assert abs(rundir.reported() - time.time()) < 60


def test_a_run_restored_without_its_leases_counts_on_from_its_other_traces(rundir):
    assert rundir.acquire_lease("learner", {}).incarnation == 1
    rundir.checkpoints().commit(10, 3, {"a": np.ones(1)}, {})
    assert rundir.acquire_lease("learner", {}).incarnation == 4
    rundir.create_history("learner-0006", ["loss"], 10, attrs={"incarnation": 6})
    assert rundir.acquire_lease("learner", {}).incarnation == 7
    rundir.create_history("evaluation-0008-0012", ["loss"], 10, attrs={"incarnation": 8})
    assert rundir.acquire_lease("learner", {}).incarnation == 9
    assert rundir.acquire_lease("coordinator", {}).incarnation == 13
    rundir.create_weights(10, 5).write_stamps([[100, 11, 1e9], [np.nan] * 3])
    assert rundir.acquire_lease("learner", {}).incarnation == 12


@pytest.mark.parametrize(
    "url",
    ["s3://key:secret@bucket/run", "s3://bucket/run?secret=1", "simplecache::s3://bucket/run", "s3://bucket/run[1]"],
)
def test_urls_that_are_refused(url):
    with pytest.raises(ConfigError, match=r"bucket/run.*storage_options") as caught:
        RunDirectory(url)
    assert "secret" not in str(caught.value)


def test_unknown_protocols_are_refused():
    with pytest.raises(ConfigError, match="got nosuch://bucket/run; wanted a path, or"):
        RunDirectory("nosuch://bucket/run")


def test_secrets_are_not_shown(s3):
    rundir = open_home(s3)
    rundir.create(DOCUMENT)
    fill(rundir)
    shown = [repr(x) for x in (rundir, rundir.folder, rundir.checkpoints(), rundir.leases(), rundir.open_weights())]
    shown += [s3.folder.read(name).decode("latin-1") for name in s3.all]
    assert not any(s3.options["secret"] in text for text in shown)

"""Promises of Checkpoints: whatever dies whenever, the newest committed one verifies and loads."""

import itertools
import json
import logging

import numpy as np
import pytest
from processes import run

from dask_isgd.errors import CheckpointError
from dask_isgd.storage import Checkpoints

TENSORS = {
    "weight": np.arange(12, dtype="f4").reshape(3, 4),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "scalar": np.array(3, "i8"),
    "empty": np.zeros((0, 3), "f2"),
    "flags": np.array([True, False]),
    "big endian": np.arange(3, dtype=">i4"),
}
STATE = {"rng": [2**100, -1], "nested": {"a": None, "b": [True, 0.1, float("inf")], "ü": "text"}}


@pytest.fixture
def checkpoints(home):
    return Checkpoints(f"{home.url}/checkpoints", run="run-1", storage_options=home.options)


def test_what_is_committed_is_loaded(checkpoints):
    name = checkpoints.commit(np.int64(120), 3, TENSORS, STATE)
    assert name == "step-000000120-i0003"
    got = checkpoints.load(name)
    assert (got.name, got.step, got.incarnation, got.state) == (name, 120, 3, STATE)
    assert got.tensors.keys() == TENSORS.keys()
    for key, values in TENSORS.items():
        np.testing.assert_array_equal(got.tensors[key], values)
        assert got.tensors[key].dtype == values.dtype.newbyteorder("=")
        assert got.tensors[key].flags.writeable
    manifest = json.loads(checkpoints.folder.read(f"{name}/manifest.json"))
    assert {k: manifest[k] for k in ("run", "step", "incarnation")} == {"run": "run-1", "step": 120, "incarnation": 3}
    assert (checkpoints.folder / name).names() == ["manifest.json", "tensors.safetensors"]


def test_none_yet(checkpoints):
    assert checkpoints.names() == []
    assert checkpoints.latest() is None
    assert checkpoints.sweep() == []


def test_the_newest_is_by_incarnation_then_step_and_the_last_are_kept(checkpoints):
    for incarnation, step in [(1, 100), (1, 900), (2, 50), (2, 1_000_000_000), (3, 7)]:
        checkpoints.commit(step, incarnation, TENSORS, {"step": step})
    assert checkpoints.names() == ["step-1000000000-i0002", "step-000000007-i0003"]
    assert checkpoints.latest().state == {"step": 7}
    checkpoints.commit(10**6, 1, TENSORS, {})  # a fenced learner, late: it never displaces a younger one
    assert checkpoints.latest().step == 7


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keep(home, keep):
    checkpoints = Checkpoints(home.folder, keep)
    for step in range(7):
        checkpoints.commit(step, 1, {}, {})
    assert [checkpoints.load(name).step for name in checkpoints.names()] == list(range(7 - keep, 7))
    assert len(home.all) == 2 * keep
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(home.folder, 0)


def test_never_overwritten(checkpoints):
    checkpoints.commit(5, 1, TENSORS, {"first": True})
    with pytest.raises(CheckpointError, match="never overwritten"):
        checkpoints.commit(5, 1, {}, {})
    assert checkpoints.latest().state == {"first": True}
    checkpoints.commit(5, 2, {}, {})  # the same step by another incarnation is another checkpoint
    assert len(checkpoints.names()) == 2


@pytest.mark.parametrize(
    ("tensors", "state", "says"),
    [
        ({"a": np.array([None])}, {}, r"do not fit.*'a': 'object\[1\]'"),
        ({"a": np.array(["x"])}, {}, "do not fit"),
        ({"a": [1.0]}, {}, "got list"),
        ({1: np.ones(1)}, {}, "string name"),
        ({}, {"a": np.float32(1)}, r"state\['a'\]: got float32"),
        ({}, {"a": [0, {"b": np.ones(1)}]}, r"state\['a'\]\[1\]\['b'\]: got ndarray"),
        ({}, {"a": {1: 2}}, "got the key 1"),
        ({}, {"a": b"x"}, "got bytes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(checkpoints, tensors, state, says):
    with pytest.raises(CheckpointError, match=says):
        checkpoints.commit(1, 1, tensors, state)
    assert checkpoints.folder.names() == []


@pytest.mark.parametrize(("step", "incarnation"), [(-1, 1), (1, -1)])
def test_negative_numbers(checkpoints, step, incarnation):
    with pytest.raises(CheckpointError, match="below zero"):
        checkpoints.commit(step, incarnation, {}, {})


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "step-1-i1", "step-000000001-i0001/../..", "step-000000001-i0001\n", "step-٠٠٠٠٠٠٠٠١-i0001"],
)  # fmt: skip
def test_other_names_are_refused(checkpoints, name):
    with pytest.raises(CheckpointError, match="got checkpoint name"):
        checkpoints.load(name)


class TestDamage:
    @pytest.fixture
    def two(self, checkpoints):
        checkpoints.commit(1, 1, TENSORS, {"good": 1})
        checkpoints.commit(2, 1, TENSORS, {"good": 2})
        return checkpoints

    def falls_back(self, checkpoints, caplog):
        with pytest.raises(CheckpointError):
            checkpoints.load("step-000000002-i0001")
        there = checkpoints.names()
        with caplog.at_level(logging.WARNING):
            assert checkpoints.latest().state == {"good": 1}
        assert ("step-000000002" in caplog.text) == ("step-000000002-i0001" in there)

    @pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
    def test_any_bit(self, two, caplog, file):
        path = f"step-000000002-i0001/{file}"
        raw = two.folder.read(path)
        for position in range(0, len(raw), 1 if two.folder.local else 97):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << position % 8
            two.folder.replace(path, bytes(flipped))
            try:
                got = two.load("step-000000002-i0001")
            except CheckpointError:
                continue
            assert got.state == {"good": 2}  # white space: the content is what was committed
            assert file == "manifest.json"

    @pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
    @pytest.mark.parametrize("left", [0, 1, 100, -1])
    def test_truncated(self, two, caplog, file, left):
        path = f"step-000000002-i0001/{file}"
        two.folder.replace(path, two.folder.read(path)[:left])
        self.falls_back(two, caplog)

    @pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
    def test_gone(self, two, caplog, file):
        two.folder.remove(f"step-000000002-i0001/{file}")
        # on a disk the folder is the mark of a commit, in a store the manifest is
        assert len(two.names()) == (1 if file == "manifest.json" and not two.folder.local else 2)
        self.falls_back(two, caplog)

    @pytest.mark.parametrize(
        "change",
        [
            {"files": {"../../secret": {"sha256": "", "bytes": 0}}},
            {"files": {}},
            {"format_version": 2},
            {"step": 3},
            {"incarnation": 2},
            {"state": {"good": 3}},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("signed", [False, True])
    def test_another_manifest(self, two, caplog, change, signed):
        from dask_isgd.storage.run.checkpoints import _digest

        path = "step-000000002-i0001/manifest.json"
        manifest = {**json.loads(two.folder.read(path)), **change}
        if signed:
            manifest["sha256"] = _digest(manifest)
        two.folder.replace(path, json.dumps(manifest).encode())
        if signed and "state" in change:
            assert two.latest().state == {"good": 3}  # a checksum is no signature
        else:
            self.falls_back(two, caplog)

    def test_a_folder_that_was_copied(self, two, caplog):
        for file in ("tensors.safetensors", "manifest.json"):
            two.folder.replace(f"step-000000009-i0009/{file}", two.folder.read(f"step-000000001-i0001/{file}"))
        with pytest.raises(CheckpointError, match="renamed or copied"):
            two.load("step-000000009-i0009")
        assert two.latest().step == 2


# Commits in forked children, each of which dies just before or after its k-th call to the operating system,
# or half-way through a write.
KILLS = """
import json, os, sys
import numpy as np
from dask_isgd.storage import Checkpoints
from dask_isgd.storage.backends import local

url, when = sys.argv[1:]
tensors = {"a": np.arange(1000.0)}
base = Checkpoints(url)
base.commit(1, 1, tensors, {"step": 1})
base.commit(2, 1, tensors, {"step": 2})
CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "replace", "link", "unlink")

def child(k):
    real, count = os, 0
    class Dying:
        def __getattr__(self, name):
            call = getattr(real, name)
            if name not in CALLS:
                return call
            def dying(*args, **kwargs):
                nonlocal count
                count += 1
                if count == k and when == "before":
                    real._exit(9)
                if count == k and when == "half" and name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                    real._exit(9)
                result = call(*args, **kwargs)
                if count == k and when != "before":
                    real._exit(9)
                return result
            return dying
    local.os = Dying()
    Checkpoints(url).commit(k + 10, 2, tensors, {"step": k + 10})
    real._exit(0)

for k in range(1, 1000):
    pid = os.fork()
    if pid == 0:
        child(k)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    latest = base.latest()
    assert latest.tensors["a"].sum() == tensors["a"].sum()
    print(json.dumps([k, status, latest.state["step"], base.names()]), flush=True)
    if status == 0:
        break
"""


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_death_at_every_sub_step_of_a_commit(tmp_path, when):
    lines = [json.loads(line) for line in run(KILLS, tmp_path, when).splitlines()]
    assert len(lines) > 12
    assert [status for _, status, *_ in lines] == [9] * (len(lines) - 1) + [0]
    before = 2
    for k, _, newest, names in lines:
        assert newest in (before, k + 10)  # the one before, or the new one: nothing in between
        assert len(names) >= 2
        before = newest
    assert before == lines[-1][0] + 10
    checkpoints = Checkpoints(tmp_path)
    assert len(checkpoints.names()) == 2
    assert all(checkpoints.load(name) for name in checkpoints.names())
    assert checkpoints.sweep() == []  # young ones may belong to a writer at work
    assert len(checkpoints.sweep(seconds=0)) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(checkpoints.names())


def test_death_at_every_request_of_a_commit_to_a_store(s3, monkeypatch):
    class Died(BaseException):
        pass

    def open_checkpoints():
        return Checkpoints(s3.url, storage_options=s3.options)

    base = open_checkpoints()
    for step in (1, 2):
        base.commit(step, 1, TENSORS, {"step": step})
    newest = 2
    for k, when in itertools.product(range(1, 20), ("before", "after")):
        checkpoints, count, step = open_checkpoints(), 0, 10 * k + (when == "after")
        ask = checkpoints.folder._answer

        def dying(*args, k=k, when=when, ask=ask, **kwargs):
            nonlocal count
            count += 1
            if count == k and when == "before":
                raise Died
            try:
                return ask(*args, **kwargs)
            finally:
                if count == k:
                    raise Died

        monkeypatch.setattr(checkpoints.folder, "_answer", dying)
        died = False
        try:
            checkpoints.commit(step, 2, TENSORS, {"step": step})
        except Died:
            died = True
        found = open_checkpoints().latest().state["step"]
        assert found in (newest, step)
        assert len(base.names()) >= 2
        assert all(base.load(name) for name in base.names())
        newest = found
        if not died:
            break
    assert k > 4
    assert found == step
    assert base.sweep() == []
    base.sweep(seconds=0)
    assert {name.partition("/")[0] for name in s3.all} == set(base.names())


FULL = """
import resource, sys
import numpy as np
from dask_isgd.errors import StorageFullError
from dask_isgd.storage import Checkpoints, History, RunDirectory, WeightArray
root = sys.argv[1]
checkpoints = Checkpoints(root + "/checkpoints")
checkpoints.commit(1, 1, {"a": np.arange(10.0)}, {})
weights = WeightArray.create(root + "/w", 10_000, 10_000)
weights.write(0, np.ones(10_000))
history = History.create(root + "/h", "learner-1", ["loss"], 5000, chunk_rows=5000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
history.append({"step": 1})
for write in (
    lambda: checkpoints.commit(2, 1, {"a": np.arange(10_000.0)}, {}),
    lambda: weights.write(0, np.zeros(10_000)),
    history.flush,
    lambda: RunDirectory(root + "/run").create({"long": "x" * 30_000}),
    lambda: WeightArray.create(root + "/checkpoints/step-000000001-i0001/manifest.json/w", 1, 1),
):
    try:
        write()
    except StorageFullError as error:
        assert root in str(error), error
        print("full")
    except NotADirectoryError:
        print("not a directory")
assert checkpoints.latest().step == 1
assert checkpoints.names() == ["step-000000001-i0001"]
assert (weights.read(0) == 1).all()
"""


def test_no_room_names_the_path_and_leaves_the_older_ones(tmp_path):
    assert run(FULL, tmp_path).split("\n")[:4] == ["full"] * 4
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_latest_of_the_committing_incarnation_are_never_pruned(home):
    checkpoints = Checkpoints(home.folder, keep=2)
    for step in (10, 20):
        checkpoints.commit(step, 7, {"a": np.ones(1)}, {})
    for step in (30, 40, 50):
        checkpoints.commit(step, 1, {"a": np.ones(1)}, {})
    assert checkpoints.orders() == [(1, 40), (1, 50), (7, 10), (7, 20)]


def test_none_that_verifies_is_an_error_and_none_at_all_is_not(home):
    checkpoints = Checkpoints(home.folder)
    assert checkpoints.latest() is None
    for step in (1, 2):
        name = checkpoints.commit(step, 1, {"a": np.ones(1)}, {})
        home.folder.replace(f"{name}/tensors.safetensors", b"damaged")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies .*got 7 bytes"):
        checkpoints.latest()
    assert checkpoints.latest_manifest()["step"] == 2
    assert checkpoints.latest_manifest(run="another") is None


def test_checkpoints_that_are_pruned_while_they_are_looked_for_are_no_error(home, monkeypatch):
    checkpoints = Checkpoints(home.folder)
    names = [checkpoints.commit(step, 1, {"a": np.ones(1)}, {}) for step in (1, 2)]
    listed = iter([["step-000000000-i0001"], names, names])
    monkeypatch.setattr(checkpoints, "names", lambda: next(listed))
    assert checkpoints.latest().step == 2

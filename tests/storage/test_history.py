"""Promises of History: a reader at any moment sees whole rows, in order, each step once."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray
import zarr
from processes import start

from dask_isgd.errors import CorruptChunkError
from dask_isgd.storage import History, read_history
from dask_isgd.storage.run.history import read_columns


def write(url, incarnation, steps, *, start_step=0, rows=1000, chunk_rows=8, group=None):
    """One incarnation's rows; loss tells which incarnation and step wrote it."""
    history = History.create(
        url,
        group or f"learner-{incarnation:04d}",
        ["loss", "gain"],
        rows,
        attrs={"incarnation": incarnation, "start_step": start_step},
        chunk_rows=chunk_rows,
    )
    for step in steps:
        history.append({"step": step, "loss": 1000 * incarnation + step})
    history.flush()
    return history


@pytest.mark.parametrize("url", ["{}/h.zarr", "memory://{}/h"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 30, 100])
@pytest.mark.parametrize("flush_every", [1, 5, 100])
def test_nothing_is_dropped_whatever_was_preallocated(tmp_path, url, rows, flush_every):
    url = url.format(tmp_path)
    history = write(url, 1, [], rows=rows)
    for step in range(30):
        history.append({"step": step, "loss": step * 2, **({"gain": 1.0} if step % 3 == 0 else {})})
        if step % flush_every == 0:
            history.flush()
    history.flush()
    got = read_history(url)
    np.testing.assert_array_equal(got.step, np.arange(30))
    np.testing.assert_array_equal(got.loss, np.arange(30) * 2)
    np.testing.assert_array_equal(np.isfinite(got.gain), np.arange(30) % 3 == 0)
    assert got.loss.dims == got.step.dims == ("report",)


@pytest.mark.parametrize(
    ("incarnations", "want"),
    [
        pytest.param([(1, range(0, 50, 10), 0)], [(1, range(0, 50, 10))], id="one"),
        pytest.param([(1, range(10, 60, 10), 0), (2, range(40, 80, 10), 30)],
                     [(1, (10, 20, 30)), (2, (40, 50, 60, 70))], id="resumed"),
        pytest.param([(1, (10, 20, 30), 0), (2, (30, 40), 30)], [(1, (10, 20, 30)), (2, (40,))], id="boundary twice"),
        pytest.param([(1, (10, 20, 30), 0), (2, (10, 20), 0)], [(2, (10, 20))], id="no checkpoint yet"),
        pytest.param([(1, (0, 10, 20), 0), (2, (0, 10), 0)], [(1, (0,)), (2, (10,))], id="from step 0"),
        pytest.param([(1, (10, 20, 30), 0), (2, (20, 30, 40), 15), (3, (30, 35), 25)],
                     [(1, (10,)), (2, (20,)), (3, (30, 35))], id="twice"),
        pytest.param([(1, (10, 20, 30), 0), (2, (25, 35), 20), (3, (15, 16), 12)],
                     [(1, (10,)), (3, (15, 16))], id="further back"),
        pytest.param([(1, (10, 20, 30), 0), (2, (), 20)], [(1, (10, 20))], id="younger has no rows"),
        pytest.param([(2, (30,), 20), (1, (10, 20, 30), 0)], [(1, (10, 20)), (2, (30,))], id="written late"),
        pytest.param([(9999, (10, 20), 0), (10000, (30,), 20)], [(9999, (10, 20)), (10000, (30,))], id="many"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [2, 1000])
def test_incarnations_make_one_history(tmp_path, incarnations, want, rows):
    for incarnation, steps, start_step in incarnations:
        write(tmp_path, incarnation, steps, start_step=start_step, rows=rows)
    got = read_history(tmp_path)
    pairs = [(incarnation, step) for incarnation, steps in want for step in steps]
    assert list(zip(got.incarnation.values.tolist(), got.step.values.tolist(), strict=True)) == pairs
    np.testing.assert_array_equal(got.loss, [1000 * incarnation + step for incarnation, step in pairs])


@pytest.mark.parametrize("prepare", [lambda url: None, lambda url: write(url, 1, [])])
def test_an_empty_history_is_an_empty_dataset(tmp_path, prepare):
    prepare(tmp_path / "h")
    got = read_history(tmp_path / "h")
    assert len(got.data_vars) == 0
    assert got.sizes["report"] == 0


def test_other_writers_and_foreign_files_are_left_out(tmp_path):
    write(tmp_path, 1, [1, 2])
    write(tmp_path, 1, [7], group="coordinator-0001")
    write(tmp_path, 1, [8], group="learners")
    (tmp_path / "zarr.json.abc.partial").touch()
    (tmp_path / "learner-0001" / "zarr.abc.partial").touch()
    (tmp_path / "learner-0003").mkdir()
    np.testing.assert_array_equal(read_history(tmp_path).step, [1, 2])
    np.testing.assert_array_equal(read_history(tmp_path, "coordinator").step, [7])


def test_columns_may_differ_between_incarnations(tmp_path):
    write(tmp_path, 1, [1])
    history = History.create(tmp_path, "learner-2", ["loss", "new"], 5, attrs={"incarnation": 2, "start_step": 1})
    history.append({"step": 2, "loss": 3, "new": 4})
    history.flush()
    np.testing.assert_array_equal(read_history(tmp_path).new, [np.nan, 4])


def test_a_group_half_laid_out_is_not_there_yet(tmp_path):
    write(tmp_path, 1, [1])
    zarr.create_group(tmp_path, path="learner-0002", attributes={"incarnation": 2, "start_step": 0})
    np.testing.assert_array_equal(read_history(tmp_path).step, [1])


def test_xarray_opens_each_group(tmp_path):
    write(tmp_path, 1, [1, 2])
    opened = xarray.open_zarr(tmp_path, group="learner-0001", consolidated=False)
    assert opened.sizes == {"report": 1000, "column": 3}
    assert opened.attrs == {"incarnation": 1, "start_step": 0}
    assert opened.reports.attrs == {"columns": ["loss", "gain", "step"]}
    np.testing.assert_array_equal(opened.reports[:3, -1], [1, 2, np.nan])


def test_an_incarnation_is_three_files(tmp_path):
    write(tmp_path / "h.zarr", 1, range(5))
    files = sorted(str(path.relative_to(tmp_path / "h.zarr")) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "learner-0001/reports/c/0/0",
        "learner-0001/reports/zarr.json",
        "learner-0001/zarr.json",
        "zarr.json",
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [({"loss": 1}, "step None"), ({"step": np.nan}, "finite"), ({"step": 1, "los": 2}, r"unknown columns \['los'\]")],
)
def test_rows_are_checked(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        write(tmp_path, 1, []).append(row)


@pytest.mark.parametrize("group", ["", "a/b", "..", "a.1"])
def test_group_names_are_checked(tmp_path, group):
    with pytest.raises(ValueError, match="wanted letters"):
        History.create(tmp_path, group, ["loss"], 5)


def test_an_incarnation_is_written_once(tmp_path):
    write(tmp_path, 1, [1])
    with pytest.raises(ValueError, match="exists"):
        write(tmp_path, 1, [1])


def test_a_failed_flush_loses_no_row(tmp_path, monkeypatch):
    history = write(tmp_path, 1, range(5))
    for step in range(5, 20):
        history.append({"step": step, "loss": step})

    def fail(self, *args):
        raise ConnectionResetError

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Array, "__setitem__", fail)
        with pytest.raises(ConnectionResetError):
            history.flush()
    np.testing.assert_array_equal(read_history(tmp_path).step, range(5))
    history.flush()
    np.testing.assert_array_equal(read_history(tmp_path).step, range(20))


def test_a_row_does_not_wait_for_a_store_that_takes_its_time(tmp_path, monkeypatch):
    history = write(tmp_path, 1, range(5))
    asked, answered, put = threading.Event(), threading.Event(), history._write

    def slow(*rows):
        asked.set()
        assert answered.wait(60)
        put(*rows)

    monkeypatch.setattr(history, "_write", slow)
    history.append({"step": 5})
    with ThreadPoolExecutor(2) as pool:
        flushed = pool.submit(history.flush)
        assert asked.wait(60)
        pool.submit(history.append, {"step": 6}).result(timeout=60)
        answered.set()
        flushed.result(timeout=60)
    history.flush()
    np.testing.assert_array_equal(read_history(tmp_path).step, range(7))


def test_a_flipped_bit_is_an_error(tmp_path):
    write(tmp_path, 1, range(5))
    path = tmp_path / "learner-0001" / "reports" / "c" / "0" / "0"
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptChunkError, match="learner-0001"):
        read_history(tmp_path)


WRITER = """
import sys
from dask_isgd.storage import History
history = History.create(sys.argv[1], "learner-0001", ["a", "b"], 200, chunk_rows=64, attrs={"incarnation": 1})
for step in range(600):
    history.append({"step": step, "a": step + 0.5, "b": -step})
    if step % 3 == 0:
        history.flush()
history.flush()
"""


def test_reading_while_another_process_appends(tmp_path):
    writer = start(WRITER, tmp_path)
    lengths = []
    while writer.poll() is None:
        got = read_history(tmp_path)
        lengths.append(got.sizes["report"])
        steps = np.arange(lengths[-1])
        np.testing.assert_array_equal(got.step, steps)
        if lengths[-1]:
            np.testing.assert_array_equal(got.a, steps + 0.5)
            np.testing.assert_array_equal(got.b, -steps)
    _, err = writer.communicate(timeout=60)
    assert writer.returncode == 0, err
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    assert read_history(tmp_path).sizes["report"] == 600


def test_rows_that_come_while_it_writes_wait_for_the_next_flush(tmp_path, monkeypatch):
    history = History.create(str(tmp_path / "h"), "learner-0001", ["loss"], 100)
    history.append({"step": 1, "loss": 1.0})
    write = History._write

    def slow(self, start, stop):
        write(self, start, stop)
        self.append({"step": 2, "loss": 2.0})  # a learner faster than its store

    with monkeypatch.context() as patch:
        patch.setattr(History, "_write", slow)
        history.flush()
    assert read_history(str(tmp_path / "h")).step.values.tolist() == [1]
    history.flush()
    assert read_history(str(tmp_path / "h")).step.values.tolist() == [1, 2]


def test_a_history_that_is_deleted_while_it_is_written_begins_again_with_the_rows_of_its_last_chunk(tmp_path):
    url = tmp_path / "history.zarr"
    history = History.create(url, "learner-0001", ["a"], 20, chunk_rows=4, attrs={"incarnation": 1, "start_step": 0})
    for step in range(1, 7):
        history.append({"step": step, "a": step})
    history.flush()
    shutil.rmtree(url)
    for step in range(7, 12):
        history.append({"step": step, "a": -step})
    history.flush()
    found = read_columns(url)
    assert found["step"].tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert found["a"].tolist() == [5, 6, -7, -8, -9, -10, -11]
    assert set(found["incarnation"].tolist()) == {1}

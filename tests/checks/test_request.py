"""The steps from a request to a prepared run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, _chunk_size, _differences
from dask_isgd.errors import RunExistsError, RunMismatchError, RunNotFoundError
from dask_isgd.pipelines.commands import control, show
from dask_isgd.storage import RunDirectory


def make_request(run_dir="run", *, scoring=None, synchronous=False, **changes) -> RunRequest:
    learning = isgd.Learning(steps=10, synchronous=synchronous)
    scoring = isgd.Scoring(**(scoring or {}))
    return RunRequest(model="m:n", data="d", run_dir=run_dir, learning=learning, scoring=scoring, **changes)


class Rows(SimpleNamespace):
    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("speed", "length", "changes", "size"),
    [
        (950.0, 100_000, {}, 900),  # about a second of work, in whole chunks
        (10.0, 100_000, {}, 100),  # at least one chunk
        (1e9, 4_000, {}, 500),  # at least eight tasks
        (950.0, 100_000, {"scoring": {"chunk_size": 300}}, 300),  # the user's size
        (950.0, 100_000, {"synchronous": True}, 100),  # independent of any clock
    ],
)
def test_chunk_size(speed, length, changes, size):
    assert _chunk_size(Rows(chunk_size=100, length=length), make_request(**changes), speed) == size


@pytest.mark.parametrize(
    ("exists", "changes", "outcome"),
    [
        (False, {}, None),
        (False, {"resume": True}, RunNotFoundError),
        (True, {}, RunExistsError),
        (True, {"overwrite": True}, None),
        (True, {"resume": True}, "abc"),
    ],
)
def test_the_document_of_a_former_run(tmp_path, exists, changes, outcome):
    request = make_request(tmp_path / "run", **changes)
    if exists:
        request.directory.create({"run": "abc", "chunk": 1, "created": 0.5, "data": {}, "model": {}})
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            request.directory.former(resume=request.resume, overwrite=request.overwrite)
    else:
        found = request.directory.former(resume=request.resume, overwrite=request.overwrite)
        assert (found and found["run"]) == outcome


@pytest.mark.parametrize(
    ("there", "here", "found"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}, []),
        ({"a": 1}, {}, [("a", 1, None)]),
        ({"b": {"c": 2, "d": 3}}, {"b": {"c": 2, "d": 4}}, [("b.d", 3, 4)]),
        ({"name": "package:one"}, {"name": "package:two"}, []),  # a model may be renamed
    ],
)
def test_differences(there, here, found):
    assert _differences(there, here) == found


@pytest.mark.parametrize(
    "use",
    [
        lambda url: isgd.attach(None, url),
        lambda url: RunDirectory(url).former(resume=True, overwrite=False),
        show.status,
        show.plot,
        lambda url: control.request(url, "stop"),
    ],
    ids=["attach", "resume", "status", "plot", "stop"],
)
def test_a_run_of_another_format_version_is_refused(tmp_path, use):
    directory = RunDirectory(tmp_path / "run")
    directory.create({"run": "abc"})
    file = tmp_path / "run" / "run.json"
    text = file.read_text()
    assert text.count('"format_version": 3') == 1
    file.write_text(text.replace('"format_version": 3', '"format_version": 1'))
    with pytest.raises(RunMismatchError, match=r"got format version 1, .* reads 3; use the version that wrote the run"):
        use(str(tmp_path / "run"))

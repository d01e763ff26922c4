"""Promises of verify: everything in a run directory is looked at, and nothing is changed."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from dask_isgd.errors import RunNotFoundError
from dask_isgd.pipelines.cli import isgd
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.run.verification import verify


@pytest.fixture
def directory(home):
    """A run with checkpoints of steps 10 and 20, reports up to step 25, and two of three chunks scored."""
    directory = RunDirectory(home.url, storage_options=home.options)
    config = {"learning": {"steps": 100}, "sampling": {"uniform": False}}
    model = {"name": "m:n", "signature": {}}
    directory.create({"run": "r", "config": config, "data": {}, "model": model, "chunk": 4, "created": 1.5})
    weights = directory.create_weights(10, 4)
    directory.acquire_lease("learner", {"host": "h"})
    for chunk in (0, 1):
        weights.write(chunk, np.arange(4))
    weights.write_stamps([[7, 1, 1e9], [7, 1, 1e9], [np.nan] * 3])
    directory.set_control(want="run", attempt=5)
    history = directory.create_history("learner-0001", ["loss"], 8, attrs={"incarnation": 1, "start_step": 0})
    for step in range(5, 30, 5):
        history.append({"step": step, "loss": 0.5})
    history.flush()
    for step in (10, 20):
        directory.checkpoints().commit(step, 1, {"a": np.ones(3)}, {})
    return directory


def contents(home):
    return {name: home.folder.read(name) for name in home.all}


def test_a_whole_run(directory, home):
    before = contents(home)
    found = verify(directory)
    assert not found.damaged, found.findings
    assert (found.resumable, found.step, found.incarnation) == (True, 20, 2)
    assert (found.steps_lost, found.chunks_lost) == (5, 1)
    assert {finding.part for finding in found.findings} == {
        "run.json",
        "control.json",
        "leases",
        "checkpoints",
        "weights",
        "history",
    }
    assert contents(home) == before


@pytest.mark.parametrize(
    ("file", "part", "expected"),
    [
        ("run.json", "run.json", (False, 20, 0)),
        ("control.json", "control.json", (True, 20, 1)),
        ("checkpoints/step-000000020-i0001/manifest.json", "checkpoints", (True, 10, 1)),
        ("checkpoints/step-000000020-i0001/tensors.safetensors", "checkpoints", (True, 10, 1)),
        ("weights.zarr/weight/zarr.json", "weights", (True, 20, 0)),
        ("weights.zarr/weight/c/0", "weights", (True, 20, 2)),
        ("history.zarr/learner-0001/reports/c/0/0", "history", (True, 20, 1)),
        ("history.zarr/learner-0001/reports/zarr.json", "history", (True, 20, 1)),
    ],
)
def test_each_damaged_file_is_found(directory, home, file, part, expected):
    home.folder.replace(file, home.folder.read(file)[:-9])
    found = verify(directory)
    assert {finding.part for finding in found.findings if finding.damaged} >= {part}
    assert (found.resumable, found.step, found.chunks_lost) == expected


def test_weights_that_disappeared_are_found(directory, home):
    home.folder.remove("weights.zarr/weight/c/1")
    (damaged,) = [finding.text for finding in verify(directory).findings if finding.damaged]
    assert damaged == "chunk 1 was scored, and its weights are gone"


def test_a_run_without_a_checkpoint_that_verifies_is_not_resumable(directory, home):
    for step in (10, 20):
        home.folder.replace(f"checkpoints/step-{step:09d}-i0001/manifest.json", b"{}")
    assert not verify(directory).resumable


def test_no_run(home):
    with pytest.raises(RunNotFoundError, match="no run at"):
        verify(RunDirectory(home.url, storage_options=home.options))


def test_the_command(tmp_path, directory, home):
    if not directory.local:
        pytest.skip("the command line takes credentials from the environment")
    result = CliRunner().invoke(isgd, ["verify", home.url])
    assert result.exit_code == 0
    last = result.output.splitlines()[-1]
    assert last == (
        "resume  continues from step 20 as incarnation 2; reported steps to train again: 5, chunks to score again: 1"
    )
    home.folder.replace("control.json", b"[]")
    result = CliRunner().invoke(isgd, ["verify", home.url, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["damaged"]
    assert CliRunner().invoke(isgd, ["verify", str(tmp_path / "none")]).exit_code == 1

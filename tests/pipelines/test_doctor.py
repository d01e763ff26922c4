"""``dask isgd doctor``: what a bug report needs, and what is wrong is said without a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from click.testing import CliRunner
from conftest import SECRET
from distributed import Client

from dask_isgd.checks import environment
from dask_isgd.pipelines.cli import isgd
from dask_isgd.pipelines.commands.doctor import described
from dask_isgd.storage import Dataset


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(isgd, ["doctor", "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, json.loads(result.stdout)


def wrong(found: dict[str, Any]) -> list[str]:
    return [f"{finding['part']}: {finding['text']}" for finding in found["findings"] if finding["wrong"]]


def test_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    code, found = run()
    assert (code, wrong(found)) == (0, [])
    here = found["here"]
    assert here["versions"]["torch"] == torch.__version__
    assert here["variables"]["MALLOC_TRIM_THRESHOLD_"] == "65536"
    assert here["torch_threads"] == torch.get_num_threads()
    assert here["extras"]["s3"].keys() == {"obstore", "boto3"}
    assert {"all", "test", "bench"}.isdisjoint(here["extras"])
    text = CliRunner().invoke(isgd, ["doctor"]).stdout
    assert text.count("ok    ") == 6
    assert "MALLOC_TRIM_THRESHOLD_=65536" in text
    assert SECRET not in text + json.dumps(found)


def test_what_is_missing():
    here = environment.environment()
    here["versions"]["zarr"] = None
    here["extras"] = {"plot": {"matplotlib": None}, "images": {"pillow": "12.0"}}
    packages, extras = described(here)[1:3]
    assert packages.wrong
    assert "zarr MISSING" in packages.text
    assert extras.text == "pillow 12.0; not installed: plot"


def test_stores_that_can_be_read_and_written(digits: Dataset, tmp_path: Path):
    code, found = run("--data", digits.url, "--run", str(tmp_path / "run"))
    assert (code, wrong(found)) == (0, [])
    assert "1438 rows" in found["findings"][-2]["text"]
    assert list(tmp_path.iterdir()) == []


def test_stores_that_cannot(tmp_path: Path):
    (tmp_path / "file").touch()
    code, found = run("--data", str(tmp_path / "nothing.zarr"), "--run", str(tmp_path / "file" / "run"))
    assert code == 1
    data, run_dir = wrong(found)
    assert "EmptyDatasetError" in data
    assert str(tmp_path / "file") in run_dir


def test_a_cluster_that_does_not_answer():
    with dask.config.set({"isgd.cluster.timeout": "2s"}):
        code, found = run("--scheduler", "tcp://127.0.0.1:1")
    assert code == 1
    assert "cluster tcp://127.0.0.1:1: OSError" in wrong(found)[0]


def test_a_cluster(client: Client):
    code, found = run("--scheduler", client.scheduler.address)
    assert (code, wrong(found)) == (0, [])
    texts = [finding["text"] for finding in found["findings"]]
    assert "2 workers: 1 with learner, 1 with scorer" in texts
    assert sum(text.startswith("the same versions, ") for text in texts) == 2

"""``--data``: a dataset that is not there is announced before it is written, and refused if the path is misspelt."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dask_isgd.errors import DataError
from dask_isgd.pipelines import PIPELINES
from dask_isgd.pipelines.cli import isgd
from dask_isgd.pipelines.commands.data import misspelt, prepared_data
from dask_isgd.storage import Dataset

DIGITS = PIPELINES["digits"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the digits at data/digits.zarr."""
    monkeypatch.chdir(tmp_path)
    DIGITS.prepare("data/digits.zarr")
    return tmp_path


@pytest.mark.parametrize("given", [None, "other/place.zarr"])
def test_what_is_written_is_announced(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    url = prepared_data(DIGITS, given, None)
    assert url == (given or "data/digits.zarr")
    assert capsys.readouterr().err == f"no dataset at {url} yet: writing digits there\n"
    assert len(Dataset(tmp_path / url)) == 1438
    assert prepared_data(DIGITS, given, None) == url
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["data/digit.zarr", "dta/digits.zarr", "dat/digist.zarr", "data/digits2.zarr"])
def test_a_path_that_is_misspelt_is_refused_and_nothing_is_written(here, given):
    with pytest.raises(DataError, match=rf"--data {given}: there is nothing, but .*data/digits\.zarr holds") as caught:
        prepared_data(DIGITS, given, None)
    assert f"dask isgd prepare digits --to {given}" in str(caught.value)
    assert [path.name for path in here.iterdir()] == ["data"]
    assert [path.name for path in (here / "data").iterdir()] == ["digits.zarr"]


@pytest.mark.parametrize("given", ["data/another.zarr", "elsewhere/digits.zarr", "data/digits.zarr/x", "data/digits"])
def test_other_names_are_no_mistake_of_another_dataset(here, given):
    assert misspelt(here / given, "fashion-mnist") is None


def test_train_ends_in_one_sentence_before_any_cluster(here):
    result = CliRunner().invoke(isgd, ["train", "digits", "--data", "data/digit.zarr", "--run", "r"])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: --data data/digit.zarr: there is nothing, but ")


def test_help_says_so():
    text = " ".join(CliRunner().invoke(isgd, ["train", "--help"]).output.split())
    assert "if nothing is there, the dataset NAME is written there first" in text

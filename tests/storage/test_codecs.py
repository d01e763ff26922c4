"""No dataset runs code: an array is decoded only with codecs of numbers, and only if it is read."""

import contextlib
import json
import pickle
from importlib.metadata import version
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from packaging.version import Version

from dask_isgd.errors import DataError
from dask_isgd.pipelines import ingest
from dask_isgd.storage import Dataset
from dask_isgd.storage.backends.zarr_internals import codec_names


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """A group of format 2 with two arrays of numbers, and one of strings that runs code when it is decoded."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # as before 0.16.6
    root = tmp_path / "bomb.zarr"
    group = zarr.open_group(root, mode="w", zarr_format=2)
    for name, values in {"x": np.ones((4, 2), "f4"), "y": np.array([0, 1, 0, 1])}.items():
        group.create_array(name, data=values, chunks=(2, *values.shape[1:]), filters=[numcodecs.Shuffle()])
    (root / "text").mkdir()
    codecs = [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}]
    metadata = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "|O", "order": "C", "fill_value": ""}
    (root / "text" / ".zarray").write_text(json.dumps({**metadata, "compressor": None, "filters": codecs}))
    for name, dims in {"x": ["sample", "k"], "y": ["sample"], "text": ["text"]}.items():
        (root / name / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": dims}))
    (root / "text" / "0").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    return root


@pytest.mark.skipif(Version(version("numcodecs")) >= Version("0.17"), reason="numcodecs 0.17 does not set it off")
def test_the_bomb_works(bomb, tmp_path):
    with contextlib.suppress(Exception):  # what it decodes to is no string
        zarr.open_array(bomb / "text", mode="r")[:]
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("consolidated", [False, True])
def test_arrays_that_are_not_read_are_not_decoded(bomb, tmp_path, consolidated):
    if consolidated:
        zarr.consolidate_metadata(bomb)
    dataset = Dataset(bomb)
    assert dataset.load().inputs[0].sum() == 8
    dataset.check()
    dataset.fingerprint()
    assert not (tmp_path / "ran").exists()


def test_a_codec_that_runs_code_is_refused_before_it_is_used(bomb, tmp_path):
    for inputs, target in ((["text"], "y"), (["x"], "text")):
        (bomb / "text" / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["sample"]}))
        with pytest.raises(DataError, match=r"array 'text' holds .* wanted booleans, integers or floats"):
            Dataset(bomb, inputs=inputs, target=target)
    (bomb / ".zattrs").write_text(
        json.dumps({"isgd": {"inputs": ["x"], "target": "y", "normalisation": {"x": {"mean": "text", "std": 1}}}})
    )
    with pytest.raises(DataError, match="'text'"):
        _ = Dataset(bomb).normalisation
    assert not (tmp_path / "ran").exists()


def test_another_codec_is_refused_by_name(tmp_path):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    group.create_array("x", data=np.ones((4, 2), "f4"), filters=[numcodecs.Base64()])
    group.create_array("y", data=np.zeros(4, "i8"))
    with pytest.raises(DataError, match="array 'x' is encoded with 'base64', wanted only codecs that run no code"):
        Dataset(tmp_path)


@pytest.mark.parametrize(("name", "options"), [("bomb.zarr", {}), ("bomb", {"engine": "zarr"})])
def test_ingestion_refuses_a_group_with_such_a_codec_before_xarray_opens_it(bomb, tmp_path, name, options):
    bomb = bomb.rename(tmp_path / name)
    with pytest.raises(DataError, match="array 'text' is encoded with 'pickle'"):
        ingest({"xarray": str(bomb), **options}, str(tmp_path / "made.zarr"), inputs=["x"], target="y")
    assert not (tmp_path / "ran").exists()


def test_the_codecs_inside_of_shards_count(tmp_path):
    array = zarr.create_array(tmp_path, shape=(8,), shards=(4,), chunks=(2,), dtype="f4")
    assert codec_names(array) == ["sharding_indexed", "bytes", "zstd", "bytes", "crc32c"]

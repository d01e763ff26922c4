"""What a dataset is opened from: the same rows whatever it is, and what would read other rows is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from numpy.testing import assert_array_equal
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from dask_isgd.errors import DataError, EmptyDatasetError, MissingChunkError
from dask_isgd.storage import Dataset

h5netcdf = pytest.importorskip("h5netcdf")
icechunk = pytest.importorskip("icechunk")
parsers = pytest.importorskip("virtualizarr.parsers")
registries = pytest.importorskip("obspec_utils.registry")
obstore_stores = pytest.importorskip("obstore.store")

N, CHUNK = 45, 10
X = np.random.default_rng(0).normal(size=(N, 3)).astype("f4")
Y = np.arange(N) % 3


def write(store: Any) -> None:
    for group in ("train", "test"):
        opened = zarr.create_group(store, path=group)
        for name, values, names in (("image", X, ("sample", "x")), ("label", Y, ("sample",))):
            chunks = (CHUNK, *values.shape[1:])
            opened.create_array(name, data=values, chunks=chunks, dimension_names=names)


@pytest.fixture
def path(tmp_path: Path) -> str:
    write(str(tmp_path / "d.zarr"))
    return str(tmp_path / "d.zarr")


@pytest.fixture
def repository(tmp_path: Path) -> Any:
    made = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
    session = made.writable_session("main")
    write(session.store)
    session.commit("both groups")
    return made


def same(data: Dataset) -> None:
    for each in (data, pickle.loads(pickle.dumps(data)), data.split("test")):  # noqa: S301
        assert each.input_names == ("image",)
        assert_array_equal(each.load().inputs[0], X)
        assert_array_equal(each.rows([44, 3]).target, Y[[44, 3]])


@pytest.mark.parametrize(
    "opened",
    [
        lambda path: LocalStore(path),
        lambda path: zarr.open_group(path, mode="r"),
        lambda path: zarr.open_group(path, path="train"),
        lambda path: xr.open_zarr(path, group="train", consolidated=False),
        lambda path: xr.open_zarr(path, group="train", consolidated=False, chunks=None),
        lambda path: ObjectStore(obstore_stores.LocalStore(path)),
    ],
    ids=["store", "group", "inner group", "xarray on dask", "xarray", "obstore"],
)
def test_the_same_rows_from_a_store_a_group_and_xarray(path, opened):
    data = Dataset(opened(path))
    same(data)
    assert data.fingerprint() == Dataset(path).fingerprint()
    assert data.local is (data.url == path)


@pytest.mark.parametrize("chunks", [None, {}])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.isel(sample=slice(0, 20)), "no variable as it lies in a Zarr store"),
        (lambda data: data.isel(sample=np.arange(N)[::-1]), "no variable as it lies in a Zarr store"),
        (lambda data: data.assign(image=data.image * 2), "'image' is a selection, decoded or computed"),
        (lambda data: data.drop_vars("image"), "no variable 'image'"),
        (lambda data: data.load(), "no variable as it lies|is a selection"),
    ],
    ids=["selected", "reversed", "computed", "dropped", "loaded"],
)
def test_what_xarray_changes_is_refused(path, chunks, change, message):
    opened = xr.open_zarr(path, group="train", consolidated=False, chunks=chunks)
    with pytest.raises(DataError, match=message):
        Dataset(change(opened), inputs="image", target="label")


def test_what_xarray_decodes_is_refused(path):
    zarr.open_array(path, path="train/image", mode="a").attrs["scale_factor"] = 2.0
    with pytest.raises(DataError, match="decoded"):
        Dataset(xr.open_zarr(path, group="train", consolidated=False))
    same(Dataset(xr.open_zarr(path, group="train", consolidated=False, mask_and_scale=False)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MemoryStore(), "in the memory of this process"),
        (ObjectStore(obstore_stores.MemoryStore()), "cannot be sent to workers"),
        (5, "got int, wanted a path, a URL, a Zarr store"),
        (xr.Dataset({"image": ("sample", X[:, 0])}), "no variable as it lies in a Zarr store"),
    ],
)
def test_what_workers_would_not_see_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        Dataset(data)


class TestIcechunk:
    def test_a_session_is_pinned_to_its_snapshot(self, repository):
        first = Dataset(repository.readonly_session("main").store, group="train")
        same(first)
        session = repository.writable_session("main")
        zarr.open_array(session.store, path="train/label", mode="a")[15] = 2  # in no chunk that the fingerprint reads
        session.commit("one label")
        second = Dataset(repository.readonly_session("main").store, group="train")
        assert (first.rows([15]).target[0], second.rows([15]).target[0]) == (0, 2)
        assert first.fingerprint()["snapshot"] != second.fingerprint()["snapshot"]
        assert first.fingerprint()["arrays"] == second.fingerprint()["arrays"]
        assert first.url != second.url

    def test_xarray(self, repository):
        store = repository.readonly_session("main").store
        data = Dataset(xr.open_zarr(store, group="train", consolidated=False))
        same(data)
        assert data.fingerprint()["snapshot"] == store.session.snapshot_id

    def test_a_writable_session_is_refused(self, repository):
        with pytest.raises(DataError, match=r"writable session.*readonly_session"):
            Dataset(repository.writable_session("main").store, group="train")

    def test_missing_chunks_and_groups(self, repository):
        session = repository.writable_session("main")
        group = zarr.open_group(session.store, path="train", mode="a")
        group.create_array("late", shape=(N,), chunks=(CHUNK,), dtype="f4", dimension_names=("sample",))
        session.commit("an array without chunks")
        store = repository.readonly_session("main").store
        with pytest.raises(MissingChunkError, match=r"'train/late', chunk 2 was never written"):
            Dataset(store, group="train", inputs="late", target="label").rows([25])
        with pytest.raises(EmptyDatasetError, match="no group 'validation'"):
            Dataset(store, group="validation")


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")  # what netCDF compresses with is none of Zarr 3's own
class TestVirtualiZarr:
    """References to the chunks of a netCDF file, which no Zarr array holds."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        encoding = {"image": {"chunksizes": (CHUNK, 3), "zlib": True}, "label": {"chunksizes": (CHUNK,)}}
        for group in ("train", "test"):
            data = xr.Dataset({"image": (("sample", "x"), X), "label": ("sample", Y)})
            data.to_netcdf(tmp_path / "d.nc", "a", group=group, engine="h5netcdf", encoding=encoding)
        return f"file://{tmp_path / 'd.nc'}"

    @staticmethod
    def references(file: str) -> Any:
        registry = registries.ObjectStoreRegistry({"file://": obstore_stores.LocalStore()})
        return parsers.HDFParser(group="train")(url=file, registry=registry)

    def test_references_are_read_as_they_are(self, file):
        data = Dataset(self.references(file))
        for each in (data, pickle.loads(pickle.dumps(data))):  # noqa: S301
            assert_array_equal(each.load().inputs[0], X)
            assert_array_equal(each.rows([44, 3]).target, Y[[44, 3]])
        assert data.fingerprint() == Dataset(self.references(file)).fingerprint()

    def test_a_chunk_that_the_file_lacks_is_missing(self, tmp_path):
        with h5netcdf.File(tmp_path / "d.nc", "w") as opened:
            train = opened.create_group("train")
            train.dimensions = {"sample": N, "x": 3}
            image = train.create_variable("image", ("sample", "x"), "f4", chunks=(CHUNK, 3))
            image[:CHUNK], image[2 * CHUNK :] = X[:CHUNK], X[2 * CHUNK :]
            train.create_variable("label", ("sample",), "i8", data=Y, chunks=(CHUNK,))
        data = Dataset(self.references(f"file://{tmp_path / 'd.nc'}"), inputs="image", target="label")
        assert_array_equal(data.rows([0, 44]).inputs[0], X[[0, 44]])
        with pytest.raises(MissingChunkError, match="chunk 1 was never written"):
            data.load()

    def test_references_kept_in_icechunk(self, file, tmp_path: Path):
        import virtualizarr

        folder = f"file://{tmp_path}/"
        config = icechunk.RepositoryConfig.default()
        files = icechunk.local_filesystem_store(str(tmp_path))
        config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(folder, files))
        repository = icechunk.Repository.create(
            icechunk.local_filesystem_storage(str(tmp_path / "repository")),
            config,
            authorize_virtual_chunk_access=icechunk.containers_credentials({folder: None}),
        )
        session = repository.writable_session("main")
        registry = registries.ObjectStoreRegistry({"file://": obstore_stores.LocalStore()})
        for group in ("train", "test"):
            with virtualizarr.open_virtual_dataset(file, registry, parsers.HDFParser(group=group)) as virtual:
                virtual.vz.to_icechunk(session.store, group=group)
        session.commit("references")
        same(Dataset(repository.readonly_session("main").store, group="train"))

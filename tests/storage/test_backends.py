"""Promises of folders, on disk and in a store: whole or not at all, one winner, errors that name the place."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import isnan

import dask
import pytest
from conftest import SECRET
from faulty_proxy import FaultyProxy
from obstore.store import MemoryStore
from zarr.storage import ObjectStore

from dask_isgd.errors import ConfigError, StorageFullError
from dask_isgd.storage.backends import local
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.local import LocalFolder
from dask_isgd.storage.backends.object_store import ObjectFolder
from dask_isgd.storage.backends.stores import open_folder, open_store


@pytest.fixture
def faulty(s3):
    """A folder in a bucket behind a server that can lose, refuse and delay its requests."""
    proxy = FaultyProxy(s3.options["endpoint_url"])
    one_request_each = {"client_options": {"pool_max_idle_per_host": "0"}}
    proxy.folder = open_folder(s3.url, {**s3.options, **one_request_each, "endpoint_url": proxy.url})
    proxy.place = s3.url
    yield proxy
    proxy.close()


def test_reading(home):
    folder = home.folder
    assert (folder.names(), folder.published("mark"), folder.exists("a")) == ([], [], False)
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    folder.replace("b/deep", b"1")
    folder.replace("a", b"2")
    folder.replace("a", b"")
    assert (folder.names(), (folder / "b").names(), folder.read("b/deep"), folder.read("a")) == (
        ["a", "b"], ["deep"], b"1", b"",
    )  # fmt: skip
    assert (folder.exists("a"), folder.exists("b"), folder.exists("b/deep"), folder.exists("deep")) == (
        True, True, True, False,
    )  # fmt: skip
    assert (folder.name, (folder / "b").url, folder.place("a")) == ("run", f"{home.url}/b", f"{home.url}/a")
    assert isnan(folder.last_written("*/shallow"))
    assert abs(folder.last_written("b/d*") - time.time()) < 60


def test_create_has_one_winner(home):
    folder, together = home.folder, threading.Barrier(16)

    def create(i):
        together.wait(10)
        return [folder.create(f"a/b/{file}", b"%d" % i) for file in range(3)]

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    for file in range(3):
        assert sum(mine[file] for mine in won) == 1
        assert folder.read(f"a/b/{file}") == b"%d" % [mine[file] for mine in won].index(True)
    assert home.all == ["a/b/0", "a/b/1", "a/b/2"]


def test_publish_never_overwrites(home):
    home.folder.publish("folder", {"a": b"1", "mark": b"mine"})
    with pytest.raises(FileExistsError):
        home.folder.publish("folder", {"a": b"2", "mark": b"theirs"})
    assert home.folder.published("mark") == ["folder"]
    assert (home.folder.read("folder/a"), home.folder.read("folder/mark")) == (b"1", b"mine")
    assert home.all == ["folder/a", "folder/mark"]


def test_remove_and_withdraw(home):
    folder = home.folder
    for name in ("one", "one-more", "two"):
        folder.publish(name, {"a": b"1", "mark": b""})
    folder.remove("one")
    folder.remove("one")
    folder.withdraw("two", "mark")
    assert home.all == ["one-more/a", "one-more/mark"]
    folder.remove("one-more/a")
    folder.remove_empty()
    assert home.all == ["one-more/mark"]
    folder.remove("one-more")
    folder.remove_empty()
    assert not folder.exists("")


def test_a_probe_of_create_leaves_nothing(home):
    home.folder.require_exclusive()
    assert home.all == []


class TestDisk:
    @pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES"])
    @pytest.mark.parametrize(
        "verb",
        [
            lambda folder: folder.replace("file", b"new"),
            lambda folder: folder.create("other", b"new"),
            lambda folder: folder.publish("folder", {"a": b"new"}),
        ],
        ids=["replace", "create", "publish"],
    )
    @pytest.mark.parametrize("call", ["open", "write", "fsync"])
    def test_no_room(self, tmp_path, monkeypatch, code, verb, call):
        (tmp_path / "file").write_bytes(b"old")

        def full(*_, **__):
            raise OSError(getattr(errno, code), "no")

        with monkeypatch.context() as patched:
            patched.setattr(local.os, call, full)
            with pytest.raises(StorageFullError, match=str(tmp_path)):
                verb(LocalFolder(tmp_path))
        assert (tmp_path / "file").read_bytes() == b"old"
        assert LocalFolder(tmp_path).names() == ["file"]

    def test_other_errors_pass(self):
        with pytest.raises(OSError, match="broken") as caught, writing("x"):
            raise OSError(errno.EIO, "broken")
        assert not isinstance(caught.value, StorageFullError)

    @pytest.mark.parametrize("code", ["EPERM", "ENOTSUP"])
    def test_create_without_hard_links(self, tmp_path, monkeypatch, code):
        def refuse(*_):
            raise OSError(getattr(errno, code), "no links here")

        monkeypatch.setattr(local.os, "link", refuse)
        assert LocalFolder(tmp_path).create("file", b"first")
        assert not LocalFolder(tmp_path).create("file", b"second")
        assert (tmp_path / "file").read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["file"]

    def test_short_writes_are_finished(self, tmp_path, monkeypatch):
        write = os.write
        monkeypatch.setattr(local.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        LocalFolder(tmp_path).replace("file", b"0123456789")
        assert (tmp_path / "file").read_bytes() == b"0123456789"

    @pytest.mark.parametrize("there", [{}, {"b": b"mine"}], ids=["one", "two"])
    def test_publish_onto_a_folder_that_appears_meanwhile(self, tmp_path, monkeypatch, there):
        folder = LocalFolder(tmp_path)
        folder.publish("folder", {"a": b"1", **there})
        monkeypatch.setattr(local.Path, "exists", lambda self: False)
        with pytest.raises(FileExistsError):
            folder.publish("folder", {"a": b"2"})
        assert folder.read("folder/a") == b"1"
        assert os.listdir(tmp_path) == ["folder"]

    def test_remove_does_not_follow_links(self, tmp_path):
        folder = LocalFolder(tmp_path)
        folder.publish("outside", {"a": b"1"})
        (tmp_path / "link").symlink_to(tmp_path / "outside")
        folder.remove("link")
        assert os.listdir(tmp_path) == ["outside"]

    def test_sweep_takes_what_is_old(self, tmp_path):
        for name, age in (("old.partial", 100), ("young.partial", 0), ("old", 100)):
            (tmp_path / name).touch()
            now = (tmp_path / name).stat().st_mtime
            os.utime(tmp_path / name, (now - age, now - age))
        folder = tmp_path / "busy.partial"  # the folder is old, a file in it is being written
        folder.mkdir()
        (folder / "young").touch()
        os.utime(folder, (now - 100, now - 100))
        assert LocalFolder(tmp_path).sweep() == [str(tmp_path / "old.partial")]
        assert sorted(os.listdir(tmp_path)) == ["busy.partial", "old", "young.partial"]
        assert LocalFolder(tmp_path / "nowhere").sweep() == []


class TestStore:
    def test_what_has_no_mark_is_not_there_and_is_made_good(self, s3):
        folder = s3.folder
        folder.replace("folder/a", b"half")  # its writer died
        assert folder.published("mark") == []
        folder.publish("folder", {"a": b"1", "mark": b"2"})
        assert (folder.published("mark"), folder.read("folder/a")) == (["folder"], b"1")

    def test_the_mark_comes_last_and_goes_first(self, s3, monkeypatch):
        folder, asked = s3.folder, []
        put, delete = folder._put, folder._delete
        monkeypatch.setattr(
            folder,
            "_put",
            lambda name, *args, **how: (asked.append((name, how.get("create", False))), put(name, *args, **how)),
        )
        monkeypatch.setattr(folder, "_delete", lambda names: (asked.append(names), delete(names)))
        folder.publish("folder", {"a": b"1", "b": b"2", "mark": b"3"})
        folder.withdraw("folder", "mark")
        assert asked == [
            ("folder/a", False), ("folder/b", False), ("folder/mark", True),
            ["folder/mark"], ["folder/a", "folder/b"], ["folder"],
        ]  # fmt: skip

    def test_sweep_takes_what_is_old_by_the_clock_of_the_store(self, s3, monkeypatch):
        folder = s3.folder
        folder.publish("done", {"a": b"1", "mark": b""})
        folder.replace("half/a", b"1")
        folder.replace("half/b", b"1")
        folder.replace("file", b"1")
        assert folder.sweep(mark="mark") == []
        assert folder.sweep(seconds=0) == []  # nothing is published here
        monkeypatch.setattr(folder, "_clock", lambda: folder.last_written("half/b") + 599)
        assert folder.sweep(mark="mark") == []
        monkeypatch.setattr(folder, "_clock", lambda: folder.last_written("half/b") + 600)
        assert folder.sweep(mark="mark") == [f"{s3.url}/half"]
        assert s3.all == ["done/a", "done/mark", "file"]

    def test_a_store_without_exclusive_puts_is_refused(self, s3, monkeypatch):
        folder = s3.folder
        put = folder._put
        monkeypatch.setattr(folder, "_put", lambda name, data, **_: put(name, data))
        with pytest.raises(ConfigError, match="lets both win"):
            folder.require_exclusive()
        assert s3.all == []

    @pytest.mark.parametrize("fault", ["no bucket", "nobody", "forbidden"])
    def test_a_store_that_cannot_be_written_is_refused(self, s3, faulty, fault):
        with dask.config.set({"isgd.storage.timeout": "500 ms"}):
            if fault == "no bucket":
                folder = open_folder("s3://no-such-bucket/run", s3.options)
            elif fault == "nobody":
                folder = open_folder("s3://bucket/run", {**s3.options, "endpoint_url": "http://127.0.0.1:1"})
            else:
                folder, faulty.faults[:] = faulty.folder, [403] * 9
            with pytest.raises(ConfigError, match=r"cannot be written.*credentials") as caught:
                folder.require_exclusive()
        assert SECRET not in str(caught.value)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/run", "memory://run", "ftp://place/run"])
    def test_only_stores_with_exclusive_puts_hold_runs(self, url):
        with pytest.raises(ConfigError, match="s3://, gs:// or az://"):
            open_folder(url)

    def test_no_permission_names_the_place(self, faulty):
        faulty.faults[:] = [403]
        with pytest.raises(StorageFullError, match=f"cannot write {faulty.place}/a: permission is denied .*PUT"):
            faulty.folder.replace("a", b"")

    @pytest.mark.parametrize("fault", ["reset", "lost", 429, 500, 503])
    def test_what_passes_is_asked_again(self, faulty, fault):
        faulty.faults[:] = [fault]
        faulty.folder.replace("a", b"1")
        faulty.faults[:] = [fault]
        assert faulty.folder.read("a") == b"1"
        assert faulty.faults == []

    @pytest.mark.parametrize("fault", ["reset", 409, 429, 503])
    def test_a_create_that_no_writer_won_is_asked_again(self, faulty, fault):
        faulty.faults[:] = [fault]
        assert faulty.folder.create("a", b"1")
        assert not faulty.folder.create("a", b"2")
        assert faulty.folder.read("a") == b"1"

    def test_a_store_that_refuses_every_writer_is_an_error_in_time(self, faulty, monkeypatch):
        monkeypatch.setattr(faulty.folder, "_timeout", 1.0)
        monkeypatch.setattr(faulty.folder, "exists", lambda _: False)
        faulty.faults[:] = [409] * 50
        with pytest.raises(OSError, match="409") as caught:
            faulty.folder.create("a", b"1")
        assert caught.value.errno == errno.EBUSY

    def test_a_put_whose_answer_was_lost(self, faulty):
        """It finds its own object, and the folder is published all the same; a plain create cannot know."""
        faulty.faults[:] = ["lost"]
        assert not faulty.folder.create("a", b"mine")
        assert faulty.folder.read("a") == b"mine"
        # of the mark, after the requests that look for it and the put of the file
        faulty.faults[:] = [None, None, None, "lost"]
        faulty.folder.publish("folder", {"a": b"1", "mark": b"mine"})
        assert faulty.folder.published("mark") == ["folder"]
        assert faulty.faults == []

    @pytest.mark.parametrize("verb", ["replace", "create", "read"])
    def test_no_answer_ends(self, faulty, monkeypatch, verb):
        monkeypatch.setattr(faulty.folder, "_timeout", 0.3)
        faulty.faults[:] = ["hang"] * 9
        with pytest.raises(TimeoutError, match=r"no response within 0\.3 s"):
            getattr(faulty.folder, verb)("a", *([b""] if verb != "read" else []))


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://bucket/run", {"key": SECRET, "secrte": SECRET}, "'secrte' is not valid for store 'S3'"),
        ("s3://bucket/run", {"key": SECRET, "secret": 5}, "wanted texts"),
        ("s3://bucket/run", {"profile": "no-such-profile"}, "no-such-profile.*profile="),
        ("az://container/run", {"acount_name": SECRET}, "'acount_name' is not valid"),
    ],
)
def test_options_that_no_store_has(url, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_folder(url, options)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "s3a://bucket/run", "gs://bucket/run", "gcs://bucket/run", "az://container/run"]
)
def test_the_clouds_that_are_known(url):
    options = {"account_name": "a"} if url.startswith("az") else {"skip_signature": True}
    assert open_folder(url, options).url == url
    assert isinstance(open_store(url, read_only=True, storage_options=options), ObjectStore)


def test_a_store_in_memory_keeps_the_same_promises():
    folder = ObjectFolder("memory://run", MemoryStore())
    folder.require_exclusive()
    folder.publish("one", {"a": b"1", "mark": b""})
    folder.replace("half/a", b"")
    assert (folder.names(), folder.published("mark")) == (["half", "one"], ["one"])
    assert folder.sweep(mark="mark") == []
    assert folder.sweep(0, mark="mark") == [folder.place("half")]
    folder.withdraw("one", "mark")
    assert folder.names() == []

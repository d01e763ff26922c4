"""Promises of the file verbs: whole or not at all, one winner, errors that name the path."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from dask_isgd.errors import StorageFullError
from dask_isgd.storage import files


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES"])
@pytest.mark.parametrize(
    "verb",
    [
        lambda path: files.replace(path, b"new"),
        lambda path: files.create(path.with_name("other"), b"new"),
        lambda path: files.publish(path.with_name("folder"), {"a": b"new"}),
    ],
    ids=["replace", "create", "publish"],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_no_room(tmp_path, monkeypatch, code, verb, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_, **__):
        raise OSError(getattr(errno, code), "no")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, call, full)
        with pytest.raises(StorageFullError, match=str(tmp_path)):
            verb(path)
    assert path.read_bytes() == b"old"
    assert files.names(tmp_path) == ["file"]


def test_other_errors_pass():
    with pytest.raises(OSError, match="broken") as caught, files.writing("x"):
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, StorageFullError)


def test_create_has_one_winner(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: files.create(path, b"%d" % i), range(100)))
    assert sum(won) == 1
    assert path.read_bytes() == b"%d" % won.index(True)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP"])
def test_create_without_hard_links(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(getattr(errno, code), "no links here")

    monkeypatch.setattr(files.os, "link", refuse)
    assert files.create(tmp_path / "file", b"first")
    assert not files.create(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_short_writes_are_finished(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    files.replace(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("there", [{}, {"b": b"mine"}], ids=["empty", "full"])
def test_publish_never_overwrites(tmp_path, monkeypatch, there):
    folder = tmp_path / "folder"
    files.publish(folder, {"a": b"1", **there})
    with pytest.raises(FileExistsError):
        files.publish(folder, {"a": b"2"})
    monkeypatch.setattr(files.Path, "exists", lambda self: False)  # it appeared in between
    with pytest.raises(FileExistsError):
        files.publish(folder, {"a": b"2"})
    assert (folder / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["folder"]


def test_remove_tree(tmp_path):
    files.publish(tmp_path / "folder", {"a": b"1"})
    files.remove_tree(tmp_path / "folder")
    files.remove_tree(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_remove_tree_does_not_follow_links(tmp_path):
    files.publish(tmp_path / "outside", {"a": b"1"})
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    files.remove_tree(tmp_path / "link")
    assert os.listdir(tmp_path) == ["outside"]


def test_sweep_takes_what_is_old(tmp_path):
    for name, age in (("old.partial", 100), ("young.partial", 0), ("old", 100)):
        (tmp_path / name).touch()
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    folder = tmp_path / "busy.partial"  # the folder is old, a file in it is being written
    folder.mkdir()
    (folder / "young").touch()
    os.utime(folder, (now - 100, now - 100))
    assert files.sweep(tmp_path) == [tmp_path / "old.partial"]
    assert sorted(os.listdir(tmp_path)) == ["busy.partial", "old", "young.partial"]
    assert files.sweep(tmp_path / "nowhere") == []

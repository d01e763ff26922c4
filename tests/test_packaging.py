"""What is installed is what lies in the repository."""

from __future__ import annotations

import os
import runpy
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
SOURCES = {"dask_isgd": "dask_isgd", "dask_isgd.storage": "storage", "dask_isgd.pipelines": "pipelines"}


def packages() -> set[str]:
    found = set()
    for package, folder in SOURCES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder)
            if not (package == "dask_isgd" and inside.parts[:1] in (("storage",), ("pipelines",))):
                found.add(".".join((package, *inside.parts)))
    return found


@pytest.mark.parametrize("links", [True, False], ids=["repository", "archive"])
def test_every_package_is_installed(links, tmp_path, monkeypatch):
    """Also from an archive, in which the links into the package are missing."""
    for package in packages():
        room, *inside = package.removeprefix("dask_isgd.").split(".")
        place = tmp_path.joinpath(*([room] if room in ("storage", "pipelines") else package.split(".")[:2]), *inside)
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").touch()
    if links:
        for name in ("storage", "pipelines"):
            (tmp_path / "dask_isgd" / name).symlink_to(f"../{name}")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "setup.py"))
    assert sorted(given["packages"]) == sorted(packages())


def test_every_file_that_is_not_python_is_installed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    found = {
        path
        for package, patterns in listed.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    package = os.walk(ROOT / "dask_isgd", followlinks=True)  # storage and pipelines are links
    files = {Path(folder, name) for folder, _, names in package for name in names}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == found


@pytest.mark.parametrize("name", ["storage", "pipelines"])
def test_the_links_into_the_package_are_relative_and_lead_somewhere(name):
    link = ROOT / "dask_isgd" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_the_command_hangs_under_dask():
    (entry,) = [e for e in entry_points(group="dask_cli") if e.name == "isgd"]
    assert entry.load().name == "isgd"

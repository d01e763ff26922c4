"""What is said about a version is the same wherever it is said."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dask_isgd as isgd

ROOT = Path(__file__).parents[1]
CONDA = {"dask-core": "dask", "pytorch": "torch"}


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)["project"]
    return found


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {key.lower(): Version(value) for key, _, value in (line.partition("==") for line in lines)}


def document(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version():
    assert project()["version"] == isgd.__version__
    assert document("CITATION.cff")["version"] == isgd.__version__
    assert document("conda/recipe.yaml")["context"]["version"] == isgd.__version__


def test_the_conda_recipe_requires_what_the_project_does():
    listed = document("conda/recipe.yaml")["requirements"]["run"]
    found = {CONDA.get(name, name) + bound for name, _, bound in (line.partition(" ") for line in listed)}
    assert found == {*project()["dependencies"], f"python{project()['requires-python']}"}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_pin_every_dependency_within_its_bounds(name):
    pinned = pins(name)
    for text in project()["dependencies"]:
        requirement = Requirement(text)
        assert pinned[requirement.name] in requirement.specifier


def test_the_lowest_versions_are_those_that_are_declared():
    """`scripts/lowest` writes them again; a bound without such a release names a version that pip cannot find."""
    pinned = pins("constraints-lowest.txt")
    for text in project()["dependencies"]:
        requirement = Requirement(text)
        (bound,) = requirement.specifier
        lowest = Version(bound.version)
        assert pinned[requirement.name].release[: len(lowest.release)] == lowest.release, requirement.name


def test_the_workflow_runs_the_legs_that_there_are():
    legs = set(re.findall(r"^(\w+)\(\) \{", (ROOT / ".ci/run").read_text(), re.MULTILINE)) - {"newest_python"}
    (job,) = document(".github/workflows/ci.yml")["jobs"].values()
    assert {each["leg"] for each in job["strategy"]["matrix"]["include"]} == legs
    policy = (ROOT / "docs/versions.md").read_text()
    assert all(f"| `{leg}` |" in policy for leg in legs)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-workflows", ".github/workflows/ci.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/idea.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_what_others_read_has_the_form_that_they_publish(schema, path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, path]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_changelog_is_in_the_common_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)

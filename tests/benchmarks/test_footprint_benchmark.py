"""The benchmark of what an import and an installation cost still runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "footprint.py"


@pytest.fixture
def footprint() -> dict[str, object]:
    return runpy.run_path(str(SCRIPT))


def test_what_is_required_and_its_size(footprint):
    core, everything = {}, {}
    footprint["required"]("dask_isgd", core, frozenset({"torch"}))
    footprint["required"]("dask_isgd", everything)
    assert {"dask-isgd", "zarr", "pandas"} <= core.keys()
    assert {"torch", "sympy"} <= everything.keys() - core.keys()
    assert core.keys().isdisjoint({"matplotlib", "scipy", "scikit-learn", "obstore", "pyarrow"})
    assert footprint["megabytes"]({"numpy": core["numpy"]}) > 1


def test_importing_the_library_costs_little_beside_dask(footprint):
    """It imports neither Dask nor torch; a process of Python alone takes half of either."""
    taken = {
        name: min(footprint["seconds"](footprint["COMMANDS"][name]) for _ in range(2)) for name in ("dask", "dask_isgd")
    }
    assert taken["dask_isgd"] <= 1.2 * taken["dask"]

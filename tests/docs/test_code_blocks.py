"""The code of a page runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dask_isgd.norms import RULES

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = [
    "rules.md",
    "optimizers.md",
    pytest.param("your-data.md", marks=[pytest.mark.cluster, pytest.mark.slow]),  # seven runs on a cluster: a minute
]


@pytest.fixture
def _rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("_rules")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dask's use of pandas
@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, Any] = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)

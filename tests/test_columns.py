"""The table of columns: complete, without torch, and the source of its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dask_isgd.columns import ANNOUNCED, EVALUATION, HISTORY, LIVE, NAMES
from dask_isgd.coordinator import evaluation
from dask_isgd.learner import reporter

SCRIPT = Path(__file__).parents[1] / "scripts" / "history-columns"


def test_the_page_is_current():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_learner_and_coordinator_write_the_columns_of_the_table():
    assert reporter.COLUMNS == NAMES
    assert tuple(column.name for column in EVALUATION) == evaluation.COLUMNS
    assert set(ANNOUNCED) < set(NAMES)


@pytest.mark.parametrize("table", [HISTORY, EVALUATION, LIVE], ids=["history", "evaluation", "live"])
def test_names_and_labels_are_unique_and_every_column_has_a_meaning(table):
    for values in ([column.name for column in table], [column.label for column in table]):
        assert len(set(values)) == len(values)
    assert all(column.meaning and not column.meaning.endswith(".") for column in table)


def test_needs_no_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import dask_isgd.columns"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

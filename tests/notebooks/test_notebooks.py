"""The notebooks run from empty folders and show what they say; they teach, and leave the checking to these tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("nbclient")

from notebook_runner import NOTEBOOKS, execute

# What holds of the results of each notebook; executed after its last cell, in its kernel.
RESULTS = {
    "01": """
late = run.history.isel(report=slice(-20, None)).mean()
assert summary["steps"] == 1200
assert summary["validation_error"] < 0.05
assert late.variance_ideal <= late.variance_stale < late.variance_uniform
assert late.gain > 1.5
assert len(run.hardest(8)) == 8
""",
    "02": """
assert sum(abs(heavy - 0.6).max(1) < 0.25) > 0.5 * len(heavy)  # near the storm; 5 % of all examples are
assert list(overview.index) == ["weather", "images", "plain Zarr", "table", "in memory", "text"]
assert overview.validation_error[["images", "plain Zarr", "table", "in memory"]].max() < 0.1
assert overview.validation_loss["weather"] < 0.25
assert overview.validation_loss["text"] < 2.5
assert overview.gain["weather"] > 1.2
""",
    "03": """
assert float(late.gain) > 1.5
assert late.variance_ideal <= late.variance_stale < late.variance_uniform
assert opened < 3000
assert uniform.summary()["gain"] is None or uniform.summary()["gain"] < 1.01
assert table.weighted.train_loss < 2 * table.uniform.train_loss
""",
    "04": """
steps = list(run.history.step.values)
assert restarts >= 1
assert stopped in ("stopped", "finished")
assert stopped_at >= killed_at - 200
assert summary["steps"] == 3000
assert steps == sorted(set(steps))  # every reported step appears once, in order, despite the restarts
assert steps[-1] == 3000
assert summary["validation_error"] < 0.06
""",
    "06": """
assert found[29] >= 15
assert found[59] >= 20
assert len(hardest.doubted()) > 12
assert set(pairs.label) | set(pairs.model) <= set(fashion.attributes["class_names"])
""",
}


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.notebooks
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    if path.stem.startswith("06") and not DEBIAN.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    execute(path, tmp_path, then=RESULTS.get(path.stem[:2], ""))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    messages = [output.text for output in outputs if output.get("name") == "stderr"]
    assert all(re.match("(ingest: missing values|data in memory) ", text) for text in messages), messages
    text = path.read_text()
    assert not re.search(r"/(tmp|root|home|work)/", text), "a path of somebody's machine"
    assert len(text) < 2_000_000


# 05 is about a loop of one's own, and checks and draws as such a loop does.
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2] != "05"], ids=lambda path: path.stem)
def test_teaches(path):
    """What to install comes first, no cell is a block of asserts, classes are at the top, figures have one style."""
    first = nbformat.read(path, as_version=4).cells[0]
    assert "pip install" in first.source
    for source in code_of(path):
        body = ast.parse(source).body
        checks = [line for line in body if isinstance(line, ast.Assert)]
        assert len(checks) <= 1, source
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        assert not [inner for node in functions for inner in ast.walk(node) if isinstance(inner, ast.ClassDef)], source
        assert "pyplot" not in source, source


def test_there_are_six():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]

"""Run notebooks from their first cell to the last, each in an empty folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path, timeout: float = 300, then: str = "") -> Any:
    """Return the notebook with its outputs. Raises CellExecutionError for the first cell that fails.

    ``then`` is code that is executed last, as one more cell.
    """
    notebook = nbformat.read(path, as_version=4)
    if then:
        notebook.cells.append(nbformat.v4.new_code_cell(then))
    # If the package is not installed, the kernel needs its folder on the path too.
    entries = [entry for entry in sys.path if entry and Path(entry) != Path(__file__).parent]
    os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


if __name__ == "__main__":
    for given in sys.argv[1:] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as empty:
            executed = execute(Path(given), Path(empty))
        executed = nbformat.reads(nbformat.writes(executed).replace(f"{empty}/", ""), as_version=4)
        for cell in executed.cells:
            cell.metadata.pop("execution", None)  # times on this machine
            if "outputs" in cell:  # warnings about how long worker processes take to end
                cell.outputs = [out for out in cell.outputs if "distributed.nanny" not in out.get("text", "")]
        nbformat.write(executed, given)
        print(given)

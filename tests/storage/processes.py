"""Scripts in processes of their own, for what only holds between processes."""

import os
import subprocess
import sys
from pathlib import Path

import dask_isgd

_ROOT = str(Path(dask_isgd.__file__).absolute().parents[1])


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start ``script`` with Python; its output is text on a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": _ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *arguments: object) -> str:
    """Run ``script`` to its end; its output, or an error with what it said."""
    process = start(script, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out

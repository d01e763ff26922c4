"""A script that starts processes at its top level: each process would import the script and start it once more."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType, ModuleType

import dask.config

from dask_isgd.errors import ConfigError


def require_main_guard() -> None:
    """Raise ConfigError if the main script calls this without ``if __name__ == "__main__":``.

    Python starts processes by importing the main script under another name. Says nothing if the caller is no script
    (a notebook, ``python -m``, a thread) or processes are forked.
    """
    if dask.config.get("distributed.worker.multiprocessing-method") == "fork":
        return
    line = _line_of_main(sys._getframe())
    script = _script(sys.modules["__main__"])
    if line is None or script is None or _is_guarded(script, line):
        return
    raise ConfigError(
        f"{script}, line {line}: starts a cluster of processes at the top level of the script, so each of them would "
        'import the script and start another cluster. Indent the code below a line `if __name__ == "__main__":`'
    )


def _line_of_main(frame: FrameType | None) -> int | None:
    """Return the line at which the main module's top level is now; None if it is not in this thread's stack."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame.f_lineno
        frame = frame.f_back
    return None


def _script(main: ModuleType) -> Path | None:
    """Return the file that a new process would import as its main module, if there is one."""
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if file is None or (spec is not None and spec.name.endswith("__main__")) or Path(file).stem == "ipython":
        return None
    return Path(file)


def _is_guarded(script: Path, line: int) -> bool:
    """Return whether an ``if`` that tests ``__name__`` begins at or above a line."""
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return True  # no Python source, so nothing is known
    tests = (node for node in ast.walk(tree) if isinstance(node, ast.If) and node.lineno <= line)
    return any(isinstance(name, ast.Name) and name.id == "__name__" for node in tests for name in ast.walk(node.test))

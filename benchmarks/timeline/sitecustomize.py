"""Write when processes start, import packages, call certain functions and end; `benchmarks/startup.py` reads it.

Python imports this module by itself if its folder is on PYTHONPATH. ISGD_TIMELINE names the file; ISGD_TIMELINE_CALLS
lists functions as "module:name". A line has the seconds since 1970, the process, its CPU seconds, and what happened.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import sys
import time
from typing import Any

_LEAST_SECONDS = 0.05
_file = os.environ.get("ISGD_TIMELINE")
_calls: dict[str, list[str]] = {}


def _note(what: str, at: float | None = None) -> None:
    assert _file is not None
    with open(_file, "a") as lines:  # one short append: lines of several processes do not mix
        lines.write(f"{time.time() if at is None else at:.3f} {os.getpid()} {time.process_time():.2f} {what}\n")


def _started() -> float:
    """Return when this process started; Linux only."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        return time.time() - float(uptime.read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")


def _timed(function: Any, name: str) -> Any:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waited(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return await function(*args, **kwargs)
            finally:
                _note(f"{time.time() - began:6.3f} s in {name}")

        return waited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            _note(f"{time.time() - began:6.3f} s in {name}")

    return called


class _Loader:
    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        began = time.time()
        self._loader.exec_module(module)
        if time.time() - began >= _LEAST_SECONDS and "." not in self._name:
            _note(f"{time.time() - began:6.3f} s to import {self._name}")
        for path in _calls.get(self._name, ()):
            *owners, last = path.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, _timed(vars(owner)[last], f"{self._name}:{path}"))


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if "." in name and name not in _calls:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, type):
                    spec.loader = _Loader(spec.loader, name)  # type: ignore[assignment]
                return spec
        return None


if _file is not None:
    for _call in os.environ.get("ISGD_TIMELINE_CALLS", "").split():
        _module, _, _path = _call.partition(":")
        _calls.setdefault(_module, []).append(_path)
    _note("starts", _started())
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    atexit.register(_note, "ends")

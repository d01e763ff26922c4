"""What every fuzz test shares: how many inputs, an audit that notices running code, and the errors that may pass."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from hypothesis import HealthCheck, Phase, settings

from dask_isgd.errors import IsgdError

EXAMPLES = int(os.environ.get("ISGD_FUZZ_EXAMPLES", "25"))
"""Inputs per kind of file."""
LIMIT = timedelta(seconds=20)
COMMANDS = frozenset(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"))
RUNNING_CODE = COMMANDS | {"pickle.find_class"}
_watched: frozenset[str] = frozenset()
_tried = 0
"""Inputs that were read in this process, whether they were refused or not."""
if "ISGD_FUZZ_EXAMPLES" in os.environ:
    atexit.register(lambda: print(f"{_tried:,} inputs"))


class CodeRanError(BaseException):
    """A file ran code."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _watched:
        raise CodeRanError(event, arguments)


sys.addaudithook(_audit)


@contextmanager
def only_our_errors(forbidden: frozenset[str] = RUNNING_CODE) -> Iterator[None]:
    """Let an IsgdError pass, and nothing else."""
    global _watched, _tried
    former, _watched = _watched, forbidden
    _tried += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library about the file: it may warn
            yield
    except IsgdError:
        pass
    finally:
        _watched = former


def fuzzed(examples: int = EXAMPLES) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=LIMIT,
        derandomize="ISGD_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def make_plain(root: Path) -> None:
    """Not of this library's making: format 2, and nothing consolidated."""
    group = zarr.open_group(root, mode="w", zarr_format=2)
    for name, values in {"x": np.ones((10, 3), "f4"), "y": np.arange(10) % 3}.items():
        group.create_array(name, data=values, chunks=(4, *values.shape[1:]))


def read_yaml_file(
    folder: Path, content: bytes, read: Callable[[Path], Any], forbidden: frozenset[str] = RUNNING_CODE
) -> None:
    path = folder / "file.yaml"
    path.write_bytes(content)
    with only_our_errors(forbidden):
        read(path)

"""What a process runs with: versions, devices, threads, allocator. It holds no secrets and fits into a bug report."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
from typing import Any

CORE = ("dask_isgd", "torch", "dask", "distributed", "zarr", "numcodecs", "numpy", "xarray", "pandas", "bokeh")
"""The packages whose versions all processes of a run should share."""
_VARIABLES = re.compile(r"(OMP|MKL|OPENBLAS|MALLOC|KMP|GOMP)_\w+|LD_PRELOAD|CUDA_VISIBLE_DEVICES")


def environment() -> dict[str, Any]:
    """Return the environment of this process as plain JSON; imports torch, and asks it for its devices."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in CORE},
        "extras": {name: extra_versions(name) for name in extras()},
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "torch_threads": torch.get_num_threads(),
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "variables": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
    }


def version(name: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def extras() -> list[str]:
    """Return the names of the extras for users, sorted."""
    return sorted(set(metadata.metadata("dask_isgd").get_all("Provides-Extra") or ()) - {"all", "bench", "test"})


def extra_versions(extra: str) -> dict[str, str | None]:
    """Return the version of each package of an extra, None for those that are not installed."""
    pattern = re.compile(rf"([\w.-]+).*;.*extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    found = (pattern.match(requirement) for requirement in metadata.requires("dask_isgd") or ())
    return {match[1]: version(match[1]) for match in found if match is not None}

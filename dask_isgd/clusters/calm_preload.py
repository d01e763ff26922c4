"""A preload for schedulers, nannies and workers that share their cores with a learner: they wake seldom."""

from __future__ import annotations

from typing import Any

from dask_isgd.runtime.dask_internals import calm


def dask_setup(server: Any) -> None:
    """Dask calls this in the server's process (``--preload`` and ``--preload-nanny``)."""
    calm(server)

"""A preload for a learner's worker under a nanny: the worker leaves SIGTERM to the nanny.

A queue that ends a job sends SIGTERM to each of its processes. If the worker handled it, it would end the
learner in the middle of a step. If it ignores the signal, the nanny, which receives it as well, closes the
worker cleanly, so the learner notices that it is leaving and commits a checkpoint.
"""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Ignore SIGTERM; Dask calls this in the worker's process (``--preload dask_isgd.clusters.sigterm_preload``)."""
    if getattr(worker, "nanny", None):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

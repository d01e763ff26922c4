"""A preload for a learner's worker under a nanny: it leaves SIGTERM to the nanny.

A queue that ends a job sends SIGTERM to every process of it. The worker's own end would take the
learner with it in the middle of a step; ignoring the signal leaves the ending to the nanny, which
got it too and closes its worker in order: the learner sees that it is leaving, and commits.
"""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Called by Dask in the worker's process (``--preload dask_isgd.clusters.sigterm_preload``)."""
    if getattr(worker, "nanny", None):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

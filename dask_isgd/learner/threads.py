"""The torch threads of a learner."""

from __future__ import annotations

import dask.config
from distributed import Worker

from dask_isgd.core.spec import RunSpec
from dask_isgd.runtime.machine_load import MachineLoad
from dask_isgd.runtime.torch_threads import LearnerThreads


def learner_threads(spec: RunSpec, worker: Worker) -> LearnerThreads:
    """Return the learner's own torch threads, with those it takes while scorers are idle and the load they follow.

    A number that the user set is kept, and a synchronous run needs sums in a fixed order.
    """
    if spec.learning.threads is not None:
        return LearnerThreads(spec.learning.threads)
    own = dask.config.get("isgd.cluster.learner-threads") or worker.state.nthreads
    if spec.learning.synchronous:
        return LearnerThreads(own)
    return LearnerThreads(own, dask.config.get("isgd.cluster.spare-threads"), MachineLoad())

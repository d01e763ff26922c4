"""``dask isgd stop``, ``pause`` and ``unpause``: requests in the run directory, which the learner reads there."""

from __future__ import annotations

from dask_isgd.storage import RunDirectory

_DONE = {
    "stop": "was asked to stop; its learner commits a checkpoint first. Resume it with --run {run} --resume",
    "pause": "was asked to pause; its learner commits a checkpoint and keeps its worker. `dask isgd unpause {run}` "
    "continues it",
    "run": "was asked to continue",
}


def request(run: str, want: str) -> str:
    """Ask the learner of a run to ``"stop"``, ``"pause"`` or ``"run"``; return a message.

    Raises RunNotFoundError if there is no run.
    """
    directory = RunDirectory(run)
    found = directory.checkpoints().latest_manifest()
    if found is not None and found["state"].get("finished"):
        return f"run {run} has already finished, at step {found['step']:,}"
    directory.set_control(want=want)
    return f"run {run} {_DONE[want].format(run=run)}"

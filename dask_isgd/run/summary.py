"""The summary of a run, which needs only its directory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dask_isgd.errors import RunNotFoundError
from dask_isgd.storage import RunDirectory

_LAST_REPORTS = 0.1
"""The fraction of the reports whose mean the summary shows."""


def summarise(directory: RunDirectory, examples_scored: int | None = None) -> dict[str, Any]:
    """Return the summary of a run; a value that is not known is None.

    train_loss: mean of the unbiased estimates in the last tenth of the reports; validation_error: fraction of the
    validation data that is misclassified at the last version evaluated, which is ``evaluated``; validation_loss:
    its mean loss there; variance: traces for one draw, a mean like train_loss; noise_scale: variance.uniform over the
    squared norm of the mean gradient, in examples like batch_size, the minibatch size (below it, variance is not what
    holds training back); examples_scored: as the coordinator
    reported it, since the directory does not record it.
    Raises RunNotFoundError if the run has neither a report nor a checkpoint.
    """
    document = directory.document("config.sampling.uniform")
    history, evaluations = directory.read_columns(), directory.read_columns("evaluation")
    rows = len(history["step"])

    def last(name: str, *, mean: bool = False) -> float | None:
        if not rows or name not in history:
            return None
        known = history[name][-max(1, int(rows * _LAST_REPORTS)) :] if mean else history[name][-1:]
        known = known[~np.isnan(known)]
        return float(known.mean()) if len(known) and np.isfinite(known).all() else None

    found = directory.checkpoints().latest()
    if found is None and not rows:
        raise RunNotFoundError(f"{directory.url}: the run has no report and no checkpoint yet; wait for the first one")
    seconds = float(found.state["seconds"]) if found is not None else (last("seconds") or 0.0)
    step = found.step if found is not None else int(last("step") or 0)
    uniform = bool(document["config"]["sampling"]["uniform"])
    evaluated = {name: float(evaluations[name][-1]) for name in evaluations} if len(evaluations["step"]) else {}
    variance = {kind: last(f"variance_{kind}", mean=True) for kind in ("ideal", "stale", "uniform")}
    square, trace = last("mean_gradient_sq_norm", mean=True), variance["uniform"]
    return {
        "run": str(directory.url),
        "steps": step,
        "seconds": round(seconds, 3),
        "train_loss": last("loss", mean=True),
        "validation_error": _finite(evaluated.get("error")),
        "validation_loss": _finite(evaluated.get("loss")),
        "evaluated": int(evaluated["step"]) if evaluated else None,
        "variance": variance,
        "gain": last("gain", mean=True),
        "noise_scale": trace / square if trace is not None and square is not None and square > 0 else None,
        "batch_size": document["config"].get("learning", {}).get("batch_size"),
        "examples_scored": 0 if uniform else examples_scored,
        "steps_per_second": round(step / seconds, 3) if seconds else None,
        "sampling": "uniform" if uniform else "importance",
    }


def final_values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a summary under the names of ``Run.latest``: an ended run is shown with these.

    None for what the summary does not know, and nobody else should then.
    """
    names = {"loss": "train_loss", "step": "steps"}
    same = ("validation_error", "validation_loss", "evaluated", "gain", "noise_scale", "steps_per_second")
    found = {name: summary.get(key) for name, key in (*names.items(), *((each, each) for each in same))}
    return {name: value for name, value in found.items() if value is not None or name not in names}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

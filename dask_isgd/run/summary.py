"""A run in a few figures, from its directory alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dask_isgd.errors import RunNotFoundError
from dask_isgd.storage import RunDirectory

if TYPE_CHECKING:
    pass

_LAST_REPORTS = 0.1


def summarise(directory: RunDirectory, examples_scored: int | None = None) -> dict[str, Any]:
    """A run's figures from its directory; None where there is no figure.

    train_loss: mean of the unbiased estimates of the last tenth of the reports; validation_error: share
    wrong of the whole validation data at the last version evaluated; variance: traces for one draw;
    examples_scored: what the run's coordinator said, of which the directory knows nothing.
    """
    document = directory.document()
    history = directory.read_history()
    evaluations = directory.read_history("evaluation")
    rows = history.sizes.get("report", 0)
    tail = history.isel(report=slice(rows - max(1, int(rows * _LAST_REPORTS)), rows)) if rows else None

    def last(name: str, *, mean: bool = False) -> float | None:
        if tail is None:
            return None
        value = float(tail[name].mean() if mean else tail[name][-1])
        return value if math.isfinite(value) else None

    found = directory.checkpoints().latest()
    if found is None and not rows:
        raise RunNotFoundError(f"{directory.url}: nothing was trained yet; wait for the first checkpoint")
    seconds = float(found.state["seconds"]) if found is not None else (last("seconds") or 0.0)
    step = found.step if found is not None else int(last("step") or 0)
    uniform = bool(document["config"]["sampling"]["uniform"])
    error = float(evaluations["error"][-1]) if evaluations.sizes.get("report", 0) else math.nan
    return {
        "run": str(directory.url),
        "steps": step,
        "seconds": round(seconds, 3),
        "train_loss": last("loss", mean=True),
        "validation_error": error if math.isfinite(error) else None,
        "variance": {kind: last(f"variance_{kind}", mean=True) for kind in ("ideal", "stale", "uniform")},
        "gain": last("gain", mean=True),
        "examples_scored": 0 if uniform else examples_scored,
        "steps_per_second": round(step / seconds, 3) if seconds else None,
        "sampling": "uniform" if uniform else "importance",
    }

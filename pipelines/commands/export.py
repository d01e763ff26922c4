"""``dask isgd export``: the trained parameters, or the reports of a run, as one file for other programs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dask_isgd.errors import CheckpointError, StorageFullError
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.backends.stores import open_folder

FORMATS = (".safetensors", ".csv")
_MODEL = "model."


def export(run: str, path: str) -> str:
    """Write the latest checkpoint's parameters (``.safetensors``) or the history (``.csv``) of a run; return the path.

    Parameters keep the names and dtypes of ``model.state_dict()``; parameters that are tied come once. Raises
    RunNotFoundError, CheckpointError if there is no checkpoint yet, StorageFullError if the file cannot be written.
    """
    directory = RunDirectory(run)
    directory.document()
    data = _parameters(directory) if Path(path).suffix.lower() == ".safetensors" else _history(directory)
    place, _, file = path.rpartition("/")
    try:
        open_folder(place or ("/" if path.startswith("/") else ".")).replace(file, data)
    except (OSError, StorageFullError) as error:
        raise StorageFullError(f"{path}: cannot be written ({error}); pass another file with --to") from error
    return path


def _parameters(directory: RunDirectory) -> bytes:
    from safetensors.torch import save

    from dask_isgd.core.models import from_arrays

    found = directory.checkpoints().latest()
    if found is None:
        raise CheckpointError(f"run {directory.name} has no checkpoint yet; wait for the first one, or stop the run")
    tensors = from_arrays(found.tensors, found.state["dtypes"])
    model = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    return save(model, metadata={"run": directory.name, "step": str(found.step)})


def _history(directory: RunDirectory) -> bytes:
    """Return one row per report, and one per evaluation, in the order of their steps."""
    rows = []
    for prefix, others in (("learner", ""), ("evaluation", "validation_")):
        columns = directory.read_columns(prefix)
        names = [name if name == "step" else f"{others}{name}" for name in columns]
        rows += [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: row["step"])
    text = io.StringIO(newline="")
    columns_of_all = (name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(["step", *columns_of_all])))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()

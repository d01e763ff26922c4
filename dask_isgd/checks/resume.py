"""Check at ``fit`` that a run can be resumed with these settings, before the cluster is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from dask_isgd.config import Learning
from dask_isgd.errors import CheckpointError, RunMismatchError
from dask_isgd.learner.checkpointing import require_steps
from dask_isgd.learner.update import make_optimizer
from dask_isgd.storage import RunDirectory


def require_resumable(directory: RunDirectory, run: str, module: nn.Module, learning: Learning) -> None:
    """Raise RunMismatchError if the latest checkpoint has more steps, or is of another optimizer or scheduler.

    Raises CheckpointError if no checkpoint verifies. Reads manifests only, no tensors.
    """
    manifest = directory.checkpoints().latest_manifest(run)
    if manifest is None:
        return
    require_steps(manifest["step"], learning.steps)
    try:
        trainer = manifest["state"]["trainer"]
        there, scheduler = _kind(trainer["optimizer"]["groups"]), trainer["schedule"]["scheduler"] is not None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory.url}: the checkpoint of step {manifest['step']} lacks {error}") from error
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    here = _kind(make_optimizer(parameters, learning).state_dict()["param_groups"])
    wrong = []
    if there != here:
        wrong.append(f"Learning.optimizer: the run has groups of {_shown(there)}, these are of {_shown(here)}")
    if scheduler != callable(learning.scheduler):
        wrong.append(f"Learning.scheduler: the run has {'one' if scheduler else 'none'}")
    if wrong:
        raise RunMismatchError(
            "cannot resume with another optimizer or scheduler:\n"
            + "\n".join(wrong)
            + "\nPass those of the run, or start a new run in another directory"
        )


def changed_settings(there: Any, here: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return each setting that differs from the run's, with both values; ``there`` is as run.json holds it."""
    former = there if isinstance(there, Mapping) else {}
    here = json.loads(json.dumps(here))  # as run.json would hold it: a tuple is a list
    changed = [
        f"{part.capitalize()}.{name}: {former[part][name]!r} → {value!r}"
        for part, settings in here.items()
        for name, value in settings.items()
        if isinstance(former.get(part), Mapping) and name in former[part] and former[part][name] != value
    ]
    rate = any(change.startswith("Learning.learning_rate:") for change in changed)
    if rate and here["learning"]["scheduler"] not in (None, "cosine"):
        changed.append("the schedule continues with the learning rate that it had")
    return changed


def _kind(groups: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    """Return the number of parameters and the names of the hyperparameters of each group."""
    return [(len(group["params"]), sorted(set(group) - {"params", "initial_lr"})) for group in groups]


def _shown(kind: list[tuple[int, list[str]]]) -> str:
    return "; ".join(f"{count} parameters with {', '.join(names)}" for count, names in kind)

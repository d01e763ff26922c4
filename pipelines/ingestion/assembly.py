"""The dataset around the chunks: its splits before they have rows, and statistics and metadata once they have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.pipelines.ingestion.features import Coding
from dask_isgd.pipelines.ingestion.plan import ShufflePlan, measured_split
from dask_isgd.pipelines.ingestion.statistics import Moments
from dask_isgd.storage.backends.local import temporary
from dask_isgd.storage.data.writing import create_split, finish_split


def create_splits(plan: ShufflePlan, *, compressed: bool) -> None:
    """Create all splits without rows. They appear at once, so that a resumed ingestion finds all of them or none."""
    if plan.data.exists():
        return
    partial = temporary(plan.data)
    for split, length in plan.lengths.items():
        create_split(str(partial), split, plan.columns.written, length, plan.chunk_size, compressed=compressed)
    os.replace(partial, plan.data)


def finish_splits(plan: ShufflePlan, coding: Coding, modes: Mapping[str, str], *, compressed: bool) -> None:
    """Write the attributes and normalisation constants of all splits; ``modes`` has the mode of each input."""
    splits = list(plan.lengths)
    moments, counts = _merge_statistics(plan, measured_split(splits))
    constants = {name: moments[name].constants(mode) for name, mode in modes.items() if mode != "none"}
    for name in coding.stacks.keys() & constants.keys():
        if modes[name] == "each":
            indicators = coding.indicators(name)
            constants[name]["mean"][indicators], constants[name]["std"][indicators] = 0.0, 1.0
    values = plan.columns.class_values
    names = [str(value) for value in (values if values is not None else plan.table.class_names or ())]
    classes = max(len(names), *(len(count) for count in counts.values()), 0) if counts else 0
    for split in splits:
        attributes: dict[str, Any] = {
            "inputs": list(plan.columns.inputs),
            "target": plan.columns.target,
            "classes": classes if plan.columns.classify else None,
            "finite": not plan.keep_missing,
            **(coding.attributes() if coding.changes else {}),
        }
        if plan.columns.classify:
            attributes["class_counts"] = _add(np.zeros(classes, np.int64), counts[split]).tolist()
            attributes["class_names"] = names or None
        finish_split(str(plan.data), split, plan.columns.written, attributes, constants, compressed=compressed)


def _merge_statistics(plan: ShufflePlan, measured: str) -> tuple[dict[str, Moments], dict[str, NDArray[np.int64]]]:
    """Return the moments of each input in the split ``measured``, and the class counts of each split.

    Statistics are merged in the order of the buckets, so that the result does not depend on where they were computed.
    """
    totals: dict[str, Moments] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for i in range(len(plan.buckets)):
        with np.load(plan.bucket(i)) as found:
            split = str(found["split"])
            if "counts" in found:
                counts[split] = _add(counts.get(split, np.zeros(0, np.int64)), found["counts"])
            for name in plan.columns.inputs if split == measured else ():
                part = Moments(int(found[f"{name}/count"]), found[f"{name}/mean"], found[f"{name}/spread"])
                totals[name] = totals[name] + part if name in totals else part
    return totals, counts


def _add(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of two arrays of counts, the shorter one padded with zeros."""
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total

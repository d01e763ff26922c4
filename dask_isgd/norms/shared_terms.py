"""Finds where parameters meet the examples in the graph of a pass, as terms that a reader may read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from itertools import islice
from typing import Any

from torch import nn

from dask_isgd.norms.graph_nodes import Feeds, accumulator, feeds_of, operation, without_examples
from dask_isgd.norms.graph_reader import Path, SharedTerm
from dask_isgd.norms.meetings import MEETINGS
from dask_isgd.norms.model_state import autocast_without_cache
from dask_isgd.norms.tensor_trees import Loss, call, checked_losses

logger = logging.getLogger("dask_isgd.norms")

PATHS = 4096
"""The largest number of paths from one parameter that are followed."""


def shared_terms(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, size: int, names: list[str]
) -> tuple[SharedTerm, ...]:
    """Return the parameters ``names`` that meet the examples at known operations only; nothing is proved yet.

    ``size`` is the number of examples, and divides no dimension of a parameter.
    """
    try:
        with autocast_without_cache():
            losses = checked_losses(loss, call(model, inputs), targets, size)
        feeds = feeds_of([losses])
        shared = without_examples(feeds, size)
        found = []
        for name in names:
            leaf = accumulator(model.get_parameter(name))
            paths = list(islice(_paths(leaf, feeds, shared), PATHS + 1))
            if len(paths) <= PATHS and all(path[-1] in MEETINGS for path in paths):
                found.append(SharedTerm(name, frozenset(paths)))
    except Exception as error:  # graphs hold operations of any library; the fallback has no such restrictions
        logger.warning("%s: its graph cannot be read (%s: %s)", type(model).__name__, type(error).__name__, error)
        return ()
    return tuple(found)


def _paths(leaf: Any, feeds: Feeds, shared: Set[Any]) -> Iterator[Path]:
    """Yield the paths from a leaf to the first nodes that are not ``shared``."""
    ahead: list[tuple[Path, Any]] = [((), leaf)]
    while ahead:
        path, last = ahead.pop()
        for node, operand in feeds.get(last, ()):
            longer = (*path, (operation(node), operand))
            if node in shared:
                ahead.append((longer, node))
            else:
                yield longer

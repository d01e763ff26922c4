"""Finds where parameters meet the examples in the graph of a pass, as terms that a reader may read."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn

from dask_isgd.norms.graph_nodes import Feeds, accumulator, feeds_of, operation, without_examples
from dask_isgd.norms.graph_reader import Path, SharedTerm, known_meetings
from dask_isgd.norms.graph_trace import GraphTrace, kind_of
from dask_isgd.norms.meetings import MEETINGS
from dask_isgd.norms.row_choices import NESTED, key_of
from dask_isgd.norms.row_owners import OwnersOfRows

logger = logging.getLogger("dask_isgd.norms")

PATHS = 4096
"""The largest number of paths from one parameter that are followed."""


def shared_terms(model: nn.Module, trace: GraphTrace, size: int, names: list[str]) -> tuple[SharedTerm, ...]:
    """Return the parameters ``names`` that meet the examples at known operations only; nothing is proved yet.

    ``size`` is the number of examples, and divides no dimension of a parameter.
    """
    try:
        feeds = feeds_of([trace.losses])
        shared = without_examples(feeds, size)
        found: list[SharedTerm] = []
        of_kind: defaultdict[Any, set[Path]] = defaultdict(set)
        for name in names:
            parameter = model.get_parameter(name)
            leaf, chosen = accumulator(parameter), trace.chosen.get(id(parameter))
            paths = list(islice(_paths(leaf, feeds, shared), PATHS + 1))
            if len(paths) > PATHS or any(path[-1] not in MEETINGS for path in paths):
                continue
            if chosen and not chosen - {NESTED} <= _recorded(leaf, feeds, frozenset(paths), size):
                continue
            of_kind[kind_of(model, name)] |= {*paths}
            found.append(SharedTerm(name, frozenset(paths), routed=chosen is not None))
        # Experts that no example of the audit met are read as the others are.
        return tuple(
            replace(term, paths=frozenset(of_kind[kind_of(model, term.name)])) if term.routed else term
            for term in found
        )
    except Exception as error:  # graphs hold operations of any library; the fallback has no such restrictions
        logger.warning("%s: its graph cannot be read (%s: %s)", type(model).__name__, type(error).__name__, error)
        return ()


def _recorded(leaf: Any, feeds: Feeds, paths: frozenset[Path], size: int) -> frozenset[Any]:
    """Return the keys of the indices that the graph records of a parameter's rows.

    None of them if an owner is unknown, or if the graph records no index of the rows at one of the meetings: an
    operation may hide it.
    """
    owners, keys = OwnersOfRows(size), frozenset[Any]()
    for path, nodes in known_meetings(leaf, feeds, paths):
        rows = owners.at(nodes[-1], path[-1][1])
        if rows is None or not rows.indices:
            return frozenset()
        keys |= {key_of(index) for index in rows.indices}
    return keys


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

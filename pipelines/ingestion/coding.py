"""Which columns are stacked, coded and filled, from the arguments of `ingest`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.pipelines.ingestion.features import CodedTable, Coding
from dask_isgd.pipelines.ingestion.missing import (
    FILL_RULES,
    ROW_RULES,
    CompleteRows,
    MissingRule,
    check_rule,
    fill_rule,
)
from dask_isgd.pipelines.ingestion.plan import SplitRule
from dask_isgd.pipelines.ingestion.survey import survey
from dask_isgd.storage.tables.frames import FrameTable
from dask_isgd.storage.tables.table import NUMBERS, TEXT, Table, likely_target

logger = logging.getLogger(__name__)

STACK = "features"
"""Name of the array that columns are stacked to, unless they are given by name."""
_MOST_CATEGORIES = 1000
FeatureNames = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class CodingRule:
    """The arguments of `ingest` that decide which columns become which inputs."""

    inputs: str | Sequence[str] | None
    target: str | None
    features: FeatureNames | None
    categorical: Sequence[str]
    missing: MissingRule
    mask: bool

    def __post_init__(self) -> None:
        check_rule(self.missing)
        if self.mask and isinstance(self.missing, str) and self.missing in ROW_RULES:
            raise DataError(
                f"mask: got True with missing={self.missing!r}, wanted a fill, beside which masks are written"
            )


@dataclass(frozen=True)
class CodedColumns:
    """A table whose columns are ready for a model, and the names of inputs and target."""

    table: Table
    coding: Coding
    inputs: tuple[str, ...]
    target: str


def code_columns(table: Table, rule: CodingRule, splits: SplitRule) -> CodedColumns:
    """Return the table with columns stacked, coded and filled; it may take a pass over all rows.

    By default the inputs are the stacks, and without any all columns of numbers. Strings and columns that are
    ``categorical`` are coded. Raises DataError for columns that cannot be coded or filled, EmptyDatasetError for a
    table without rows.
    """
    if table.length < 1:
        raise EmptyDatasetError("source: got no rows, wanted at least one")
    target = rule.target if rule.target is not None else likely_target(table.columns)
    given = [rule.inputs] if isinstance(rule.inputs, str) else rule.inputs
    stacks = _stacks(table, rule.features, given, (target, splits.column))
    if given is None:
        numbers = [n for n, c in table.columns.items() if c.dtype.kind in NUMBERS and n not in (target, splits.column)]
        inputs = [*stacks] or numbers
    else:
        inputs = [*(name for name in stacks if name not in given), *given]
    used = [column for columns in stacks.values() for column in columns]
    used = list(dict.fromkeys([*used, *(name for name in inputs if name in table.columns)]))
    _require_known(rule, used, stacks)
    if rule.missing == "drop":
        if splits.lists_rows:
            raise DataError("missing: got 'drop' with splits by row numbers, wanted one of the two")
        table = CompleteRows(table, [name for name in dict.fromkeys([*used, target]) if name in table.columns])
    coding = _coding(table, rule, stacks, used, splits)
    ready = CodedTable(table, coding) if coding.changes else table
    return CodedColumns(ready, coding, tuple(inputs), target)


def _stacks(
    table: Table, features: FeatureNames | None, inputs: Sequence[str] | None, others: Sequence[str | None]
) -> dict[str, tuple[str, ...]]:
    """Return the columns of each stack, by its name.

    By default all columns of numbers of a frame are stacked, except ``others``: the target, and what rows are split by.
    """
    known = table.columns
    if features is None and inputs is None and isinstance(table, FrameTable):
        features = [n for n, c in known.items() if c.dtype.kind in NUMBERS and not c.shape and n not in others]
        left = [name for name in known if name not in features and name not in others]
        if left:
            logger.warning(
                "ingest: the columns %s are left out, because they do not hold numbers; name strings in features=[…] "
                "or inputs=[…] to have them coded", ", ".join(map(repr, left)),
            )  # fmt: skip
    stacks = features if isinstance(features, Mapping) else {STACK: features} if features else {}
    for name, columns in stacks.items():
        if isinstance(columns, str) or not columns or len(set(columns)) < len(columns):
            raise DataError(f"features: got {columns!r} for {name!r}, wanted a list of different columns")
        for column in columns:
            kind = known[column].dtype.kind if column in known and not known[column].shape else ""
            if column in others or not kind or kind not in NUMBERS + TEXT:
                raise DataError(
                    f"features: got {column!r}, wanted columns with one number or string per row, and not the target; "
                    f"there are {sorted(known)}"
                )
        if name in known:
            raise DataError(f"features: got {name!r}, which is a column already; wanted another name for the stack")
    return {name: tuple(columns) for name, columns in stacks.items()}


def _require_known(rule: CodingRule, used: Sequence[str], stacks: Mapping[str, tuple[str, ...]]) -> None:
    for what, names in (("categorical", rule.categorical), ("missing", rule.missing)):
        unknown = [] if isinstance(names, (str, int, float)) else [name for name in names if name not in used]
        if unknown:
            raise DataError(f"{what}: got {unknown}, wanted names among the features and inputs {list(used)}")
    if rule.mask and not stacks:
        raise DataError("mask: got True, wanted features=[…], beside whose numbers masks are written")


def _coding(
    table: Table, rule: CodingRule, stacks: Mapping[str, tuple[str, ...]], used: Sequence[str], splits: SplitRule
) -> Coding:
    coded = frozenset(name for name in used if name in rule.categorical or table.columns[name].dtype.kind in TEXT)
    rules = {name: fill_rule(rule.missing, name) for name in used}
    surveyed = {name: fill for name, fill in rules.items() if name in coded or fill is not None}
    measured = splits.measured(table) if set(rules.values()) & set(FILL_RULES) else np.zeros(table.length, bool)
    categories, fills = survey(table, surveyed, coded, measured)
    stacked = frozenset(column for columns in stacks.values() for column in columns)
    for name in stacked & coded:
        if len(categories[name]) > _MOST_CATEGORIES:
            raise DataError(
                f"column {name!r}: got {len(categories[name]):,} categories, wanted at most {_MOST_CATEGORIES:,} in "
                "features; name the column in inputs=[…], for an embedding, or leave it out"
            )
    for name, fill in fills.items():
        taken = f", the {rules[name]} of the training split" if rules[name] in FILL_RULES else ""
        value = f"{fill.value!r}" if np.ndim(fill.value) == 0 else "numbers"
        logger.warning(
            "ingest: missing values in %s rows of %r are replaced by %s%s", f"{fill.count:,}", name, value, taken
        )
    masks = stacked & fills.keys() if rule.mask else frozenset()
    return Coding(stacks=stacks, categories=categories, fills=fills, masks=frozenset(masks))

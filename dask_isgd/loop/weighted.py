"""What carries the coefficient of each draw through a DataLoader, beside the example it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, IterableDataset, default_collate

from dask_isgd.errors import ConfigError


class WeightedIndex(NamedTuple):
    """One draw. A dataset that is not wrapped in ``Weighted`` fails on it, instead of losing the coefficient."""

    row: int
    coefficient: float
    """1/(N q), of this very draw."""


class Weighted(Dataset[tuple[int, float, Any]]):
    """A map-style dataset whose examples are ``(index, coefficient, example)``.

    Use it as the dataset of a ``DataLoader`` whose ``batch_sampler`` is an ``ImportanceBatchSampler``. The default
    collate function makes int64 (B,), float64 (B,) and the collated examples of it; wrap one of your own in
    ``weighted_collate``. The wrapped dataset's ``__getitems__`` is used if it has one.

    Raises ConfigError for an ``IterableDataset``, whose examples cannot be drawn.
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        if isinstance(dataset, IterableDataset):
            raise ConfigError(
                f"Weighted: got {type(dataset).__name__}, which yields examples in an order of its own; wanted a "
                "dataset that returns the example of an index"
            )
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, drawn: Any) -> tuple[int, float, Any]:
        index, coefficient = _checked(drawn)
        return index, coefficient, self.dataset[index]

    def __getitems__(self, drawn: list[Any]) -> list[tuple[int, float, Any]]:
        pairs = [_checked(each) for each in drawn]
        fetch = getattr(self.dataset, "__getitems__", None)
        indices = [pair.row for pair in pairs]
        examples = fetch(indices) if fetch is not None else [self.dataset[index] for index in indices]
        return [(*pair, example) for pair, example in zip(pairs, examples, strict=True)]


def _checked(drawn: Any) -> WeightedIndex:
    if not isinstance(drawn, WeightedIndex):
        raise ConfigError(
            f"Weighted: got the index {drawn!r} without a coefficient, wanted what an ImportanceBatchSampler yields; "
            "pass one as batch_sampler=, and keep others from replacing it"
        )
    return drawn


class weighted_collate:
    """A collate function for ``Weighted`` data from one for the examples, (list of examples) -> minibatch.

    It returns ``(index, coefficient, minibatch)``: int64 (B,), float64 (B,), and what ``collate`` returns.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[int, float, Any]]) -> tuple[Any, Any, Any]:
        indices, coefficients, examples = zip(*rows, strict=True)
        return default_collate(list(indices)), default_collate(list(coefficients)), self.collate(list(examples))

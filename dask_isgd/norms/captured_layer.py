"""What is captured of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dask_isgd.norms.batch_layouts import BatchLayout


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose rule serves some of its parameters."""

    name: str
    """The module's name in the model."""
    unshared: frozenset[str] = frozenset()
    """Its parameters that nothing else uses: the rule returns their norms at the call."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Its parameters used at several calls, with their names in the model: gradients are summed first."""
    layout: BatchLayout = BatchLayout.FIRST
    """Where the batch is in its input and output."""

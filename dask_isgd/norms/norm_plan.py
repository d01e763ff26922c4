"""The plan of the norms of one model, which an audit proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dask_isgd.norms.capture import Capture
from dask_isgd.norms.captured_layer import CapturedLayer
from dask_isgd.norms.graph_reader import SharedTerm
from dask_isgd.norms.per_example_copies import Shape


@dataclass(frozen=True)
class NormPlan:
    """How the norms of one model are computed."""

    layers: tuple[CapturedLayer, ...]
    copies: Mapping[str, Shape]
    """Parameters replaced with one copy per example, and the copy's shape."""
    shared: tuple[SharedTerm, ...]
    """Parameters read off the graph where they meet the examples."""
    calls: tuple[tuple[str, int], ...]
    """(layer, dimensions of its output) of every call that a pass must make, in order."""
    arrived: frozenset[int]
    """Indices of the calls whose gradient must arrive."""
    fallback: tuple[str, ...]
    """Parameters whose gradients are computed one example at a time."""
    by_vmap: bool
    """Whether the fallback uses vmap, not a loop."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each parameter of the fallback is there."""
    size: int = 0
    """The number of examples in the audit's batch."""
    deterministic: bool = True
    """Whether the model draws no random numbers in its mode."""
    conclusive: bool = True
    """False if the audit's losses were not finite: it must be repeated on the next batch."""

    def matches(self, capture: Capture, size: int) -> bool:
        """Return whether a pass over ``size`` examples made the calls that the audit proved."""
        return (
            tuple(capture.calls) == self.calls
            and self.arrived == set(capture.arrived)
            and not capture.changed
            and all(term.shape == (size,) for term in capture.terms.values())
        )

    def same_as(self, other: NormPlan) -> bool:
        """Return whether two audits came to the same result."""
        served = self.layers, self.copies, self.shared, self.fallback, self.calls, self.arrived
        return served == (other.layers, other.copies, other.shared, other.fallback, other.calls, other.arrived)

    @property
    def forward_unchanged(self) -> bool:
        """Whether an ordinary training step yields all the norms, without replacing any of its tensors."""
        return not (self.fallback or self.copies)

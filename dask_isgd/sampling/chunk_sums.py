"""How the fresh norms of a scored chunk compare with the weights they replace."""

from __future__ import annotations

from dataclasses import dataclass

from dask_isgd.sampling.draws import Floats


@dataclass(frozen=True, slots=True)
class ChunkSums:
    """Sums over the good examples of a chunk: fresh norms, and the proposal weights s that they replace.

    s is in units of the proposal's mean, so that sums of chunks can be added even if they refer to different proposals.
    """

    norms: float
    """Σ fresh."""
    squares: float
    """Σ fresh²."""
    squares_over_proposal: float
    """Σ fresh²/s."""
    proposal: float
    """Σ s."""
    count: int
    """Number of examples in the sums."""
    bad: int
    """Number of examples left out because their fresh norm was NaN, infinite or negative."""

    @classmethod
    def of(cls, fresh: Floats, proposal: Floats, bad: int) -> ChunkSums:
        """Return the sums of the good norms (n,) and of the weights s (n,) they replace; ``bad`` were left out."""
        squares = fresh * fresh
        return cls(
            norms=float(fresh.sum()),
            squares=float(squares.sum()),
            squares_over_proposal=float((squares / proposal).sum()),
            proposal=float(proposal.sum()),
            count=len(fresh),
            bad=bad,
        )

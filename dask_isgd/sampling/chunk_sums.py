"""What a freshly scored chunk says about the weights it replaces."""

from __future__ import annotations

from dataclasses import dataclass

from dask_isgd.sampling.draws import Floats


@dataclass(frozen=True, slots=True)
class ChunkSums:
    """Sums over the good examples of a chunk, the fresh norms against the proposal weights s they replace.

    s is in units of the proposal's mean: sums of several chunks go together, whichever proposals they are against.
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
    """Examples summed over."""
    bad: int
    """Examples left out, whose fresh norm was NaN, infinite or negative."""

    @classmethod
    def of(cls, fresh: Floats, proposal: Floats, bad: int) -> ChunkSums:
        """From the good norms (n,), the weights s (n,) they replace, and how many norms were left out."""
        squares = fresh * fresh
        return cls(
            norms=float(fresh.sum()),
            squares=float(squares.sum()),
            squares_over_proposal=float((squares / proposal).sum()),
            proposal=float(proposal.sum()),
            count=len(fresh),
            bad=bad,
        )

"""Statistics of a sampler: pure functions of its proposal, its weights and the versions of its chunks."""

from __future__ import annotations

import math

import numpy as np

from dask_isgd.sampling.draws import Floats
from dask_isgd.sampling.proposal import Proposal
from dask_isgd.sampling.weight_blocks import WeightBlocks


def sampler_stats(proposal: Proposal, weights: WeightBlocks, versions: Floats, step: int) -> dict[str, float]:
    """Return plain floats about a proposal at ``step``; ``versions`` (n_chunks,) are NaN for chunks never scored.

    scored_fraction: share of the examples with a weight. ess_fraction: (Σ s)²/(N Σ s²).
    largest_coefficient: 1/(N q) of the least probable example that can be drawn; with fading, an upper bound.
    mean_age, max_age: steps since their version, over the examples of scored chunks. mean_weight: of the stored
    weights w. ideal_gain: N Σ w²/(Σ w)² over the scored examples, 1 if all weights are zero. What needs a scored
    example is NaN while there is none.
    """
    n = weights.n
    known = n - weights.unscored
    total, squares = weights.norm_sums()
    scored = ~np.isnan(versions)
    age = np.maximum(0.0, step - versions[scored])
    lengths = weights.lengths[scored]
    mean = total / known if known else math.nan
    spread = proposal.squares(weights)
    return {
        "scored_fraction": known / n,
        "ess_fraction": (proposal.total / n) * (proposal.total / spread),
        "largest_coefficient": proposal.total / proposal.count / proposal.smallest(weights.smallest, weights.newest),
        "mean_age": float((age * lengths).sum() / lengths.sum()) if len(age) else math.nan,
        "max_age": float(age.max()) if len(age) else math.nan,
        "mean_weight": mean,
        "ideal_gain": squares / max(1, known) / mean**2 if mean else 1.0,
    }

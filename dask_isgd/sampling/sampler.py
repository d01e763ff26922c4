"""The importance sampler: weights in, minibatches out, whatever the number of examples."""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dask_isgd.config import Sampling
from dask_isgd.errors import DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.sampling.bad_norms import check_norms, is_bad
from dask_isgd.sampling.draws import Draw, Floats, Integers, pick_shared, positions, uniform
from dask_isgd.sampling.feedback import Feedback
from dask_isgd.sampling.proposal import Ageing, Proposal, flat, propose
from dask_isgd.sampling.tree_search import TreeSearch
from dask_isgd.sampling.weight_blocks import WeightBlocks

logger = logging.getLogger("dask_isgd.sampling")

_SLICE = 4096
"""Examples whose probabilities are computed at once."""


class ImportanceSampler:
    """Draws minibatches of N examples with probability proportional to smoothed, faded weights.

    Four levels: a minibatch picks chunks from cumulated chunk sums, groups of blocks inside them, blocks
    inside those, examples inside blocks; each probability is the product of the shares picked with. An
    update costs O(chunk), a draw O(batch × sqrt(chunk/64)), plus O(chunks) when a weight changed
    since the last draw. Holds one float32 and one bit an example, and a tenth more for the sums.

    A weight is the norm seen last or, with ``ema_decay`` m, the root of m w² + (1 - m) ||g||²: norms go up
    and down from one version to the next, and the best weight is the root of the expected square.

    Ages move only at ``refresh``; prior and smoothing constants follow the weights at once, so that
    bounds on the coefficients hold for every draw. Formulas: ``dask_isgd.sampling.proposal``.
    Not for several threads at once.
    """

    def __init__(self, n: int, chunk_size: int, sampling: Sampling) -> None:
        if n < 1:
            raise EmptyDatasetError(f"got {n} examples, wanted at least 1; check the dataset's sample dimension")
        if chunk_size < 1:
            raise DataError(f"chunk_size: got {chunk_size}, wanted at least 1; pass the scoring chunk's examples")
        self.n, self.chunk_size, self.sampling = n, min(chunk_size, n), sampling
        self._weights = WeightBlocks(n, self.chunk_size, sampling.exponent)
        self._feedback = Feedback(n, self.chunk_size)
        self.n_chunks = len(self._weights.lengths)
        self.versions: Floats = np.full(self.n_chunks, np.nan)
        """(n_chunks,) version each chunk was last scored at, NaN: never."""
        self._age: Floats = np.full(self.n_chunks, np.inf)
        self._out: NDArray[np.bool_] = np.zeros(self.n_chunks, bool)
        self._even: Proposal | None = None
        """What uniform draws are of once chunks are left out."""
        self._step = 0
        self._ageing: Ageing | None = None
        self._settled: Proposal | None = None
        self._warned = False

    @property
    def biased(self) -> bool:
        """True under the ``drop`` policy, whose estimates are of the examples in use only."""
        return self.sampling.max_age_steps is not None and not self.sampling.uniform

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held, settled = [*self._arrays, self._weights.lengths], self._settled
        if settled is not None:
            held += [settled.shift, settled.edges]
        for ageing in (self._ageing, None if settled is None else settled.ageing):
            held += [] if ageing is None else [a for a in vars(ageing).values() if isinstance(a, np.ndarray)]
        return sum({id(array): array.nbytes for array in held}.values())

    # BatchSampler

    def draw(self, batch: int, rng: np.random.Generator, kind: str | None = None) -> Draw:
        """``batch`` examples from the proposal in force, spread as ``kind`` or else ``sampling.scheme`` says."""
        if self.sampling.uniform:
            return self.draw_uniform(batch, rng, kind)
        return self._drawn(self._proposal(), batch, rng, kind)

    def _drawn(self, proposal: Proposal, batch: int, rng: np.random.Generator, kind: str | None) -> Draw:
        chunks, q, inside = pick_shared(proposal.edges, positions(kind or self.sampling.scheme, batch, rng))
        indices = chunks * self.chunk_size
        descent = TreeSearch(proposal, self._weights, chunks)
        for unit in self._weights.units:
            columns, share, inside = descent.edges().pick(inside)
            q *= share
            indices += columns * unit
            descent.enter(columns)
        return Draw(indices, 1.0 / (proposal.count * q), q)

    def draw_uniform(self, batch: int, rng: np.random.Generator, kind: str | None = None) -> Draw:
        """``batch`` examples, all equally probable but for those left out: coefficients 1."""
        if self._even is not None:
            return self._drawn(self._even, batch, rng, kind)
        return uniform(self.n, kind or self.sampling.scheme, batch, rng)

    def uniform_probabilities(self, indices: ArrayLike) -> Floats:
        """(B,) probabilities of ``indices`` (B,) in ``draw_uniform``."""
        out = self._out[self._checked(indices) // self.chunk_size]
        return np.where(out, 0.0, 1.0 / (self.n if self._even is None else self._even.count))

    def probabilities(self, indices: ArrayLike | None = None) -> Floats:
        """The probabilities q in force, float64: of ``indices`` (B,), or of all N where None (O(N)).

        They are of the very sums ``draw`` searches. A dropped chunk has probability zero.
        """
        if indices is None:
            parts = (np.arange(start, min(self.n, start + _SLICE)) for start in range(0, self.n, _SLICE))
            return np.concatenate([self.probabilities(part) for part in parts])
        proposal = self._proposal()
        chunks, inside = np.divmod(self._checked(indices), self.chunk_size)
        q = proposal.shares()[chunks]
        descent = TreeSearch(proposal, self._weights, chunks)
        for unit in self._weights.units:
            columns, inside = np.divmod(inside, unit)
            q *= descent.edges().shares(columns)
            descent.enter(columns)
        return q

    @property
    def uniform_share(self) -> float:
        """Share of the proposal that smoothing spreads evenly over the examples in use: 1 is a uniform proposal."""
        if self.sampling.uniform:
            return 1.0
        proposal = self._proposal()
        return min(1.0, proposal.constant * proposal.count / proposal.total)

    @property
    def whole(self) -> bool:
        """Whether every chunk that can be drawn from has been scored."""
        return not (np.isnan(self.versions) & ~self._out).any()

    def seen(self, indices: Integers) -> NDArray[np.bool_]:
        """(B,) whether each of ``indices`` (B,) lies in a chunk that was scored."""
        return ~np.isnan(self.versions[indices // self.chunk_size])

    def weights(self, chunk: int) -> Floats:
        """(chunk_len,) float64 proposal weights s in force, zero in a dropped chunk."""
        self._check_chunk(chunk)
        proposal = self._proposal()
        return np.asarray(self._chunk_weights(chunk, proposal) * proposal.usable[chunk])

    def leave_out(self, chunk: int) -> None:
        """Draw nothing of a chunk any more: what is estimated from then on is the mean over the others.

        EmptyDatasetError where none is left.
        """
        self._check_chunk(chunk)
        self._out[chunk] = True
        if self._out.all():
            raise EmptyDatasetError(f"all {self.n_chunks} chunks were left out, wanted at least one to draw from")
        self._left_out()

    def _left_out(self) -> None:
        w = self._weights
        ageing = Ageing(Sampling(uniform=True), w.lengths, w.scored.chunks, self._age, self._out)
        self._even = flat(ageing, blank=False) if self._out.any() else None
        self._ageing = self._settled = None

    # Learning the weights

    def update(self, chunk: int, weights: ArrayLike, version: int) -> int:
        """Replace one chunk's weights by norms scored at ``version``; O(chunk).

        ``weights`` (chunk_len,): a norm that is NaN, infinite (in float32) or negative leaves that example's
        former weight, is counted and logged; more than one in a hundred (and
        more than one) raise ``NonFiniteNormsError`` and change nothing. The caller orders updates: the last one counts.

        Feedback is kept where all of the chunk's feedback is newer than ``version``, and replaced
        otherwise: a kept weight is never older than its chunk's version says, at the price of
        losing feedback a little newer than the scores when feedback and scores interleave.

        Returns how many norms were NaN, infinite or negative, and therefore ignored.
        """
        self._check_chunk(chunk)
        former = self._weights.chunk(chunk)
        with np.errstate(over="ignore"):
            fresh = np.asarray(weights).astype(np.float32)
        if fresh.shape != former.shape:
            raise LengthMismatchError(
                f"chunk {chunk}: got weights of shape {fresh.shape}, wanted {former.shape}; pass one norm an example"
            )
        good = ~check_norms(fresh, f"chunk {chunk} at version {version}", chunk * self.chunk_size)
        bad = int(len(fresh) - good.sum())
        if bad:
            logger.warning("chunk %d at version %d: %d bad norms, former weights kept", chunk, version, bad)
        replaced = good & ~self._feedback.newer(chunk, version, len(fresh))
        self._weights.put(chunk, np.where(replaced, self._blended(former, fresh), former))
        self.versions[chunk] = version
        self._age[chunk] = max(0, self._step - version)
        self._ageing = self._settled = None
        return bad

    def feedback(self, indices: ArrayLike, norms: ArrayLike, step: int) -> int:
        """Norms (B,) of examples ``indices`` (B,) from the learner's own pass at ``step``; O(blocks touched).

        Returns how many were NaN, infinite or negative, and therefore ignored.
        """
        wanted = self._checked(indices)
        with np.errstate(over="ignore"):
            fresh = np.asarray(norms).astype(np.float32)
        if fresh.shape != wanted.shape:
            raise LengthMismatchError(
                f"feedback: got norms of shape {fresh.shape} for indices of shape {wanted.shape}, "
                "wanted one norm an index; pass the whole minibatch"
            )
        good = ~is_bad(fresh)
        bad = 0 if good.all() else int(len(fresh) - good.sum())
        if bad:
            logger.warning("step %d: %d of %d norms of the minibatch are bad and ignored", step, bad, len(fresh))
            wanted, fresh = wanted[good], fresh[good]
        if len(wanted):
            unscored = self._weights.unscored
            places = self._weights.places(wanted)
            self._weights.scatter(places, self._blended(self._weights.values[places], fresh))
            self._feedback.mark(wanted, step)
            self._settled = None
            if self._weights.unscored != unscored:
                self._ageing = None
        return bad

    def refresh(self, step: int) -> None:
        """Let every scored chunk age to ``step``; once per publication, O(n_chunks).

        A chunk known from feedback alone has no version and therefore no age: it does not fade.
        """
        self._step = step
        self._age[:] = np.where(np.isnan(self.versions), np.inf, np.maximum(0.0, step - self.versions))
        self._ageing = self._settled = None

    # Reporting

    def stats(self, step: int) -> dict[str, float]:
        """Plain floats about the proposal in force.

        scored_fraction: share of the examples with a weight. ess_fraction: (Σ s)²/(N Σ s²).
        largest_coefficient: 1/(N q) of the least probable example that can be drawn. mean_age, max_age: steps,
        over the examples of scored chunks. mean_weight: of the stored weights w. ideal_gain: N Σ w²/(Σ w)²
        over the scored, 1 where all are zero. What needs a scored example is NaN while there is none.
        """
        proposal, w = self._proposal(), self._weights
        known = self.n - w.unscored
        total, squares = w.norm_sums()
        seen = ~np.isnan(self.versions)
        age = np.maximum(0.0, step - self.versions[seen])
        lengths = w.lengths[seen]
        mean = total / known if known else math.nan
        spread = proposal.squares(w.sums.chunks, w.squares)
        return {
            "scored_fraction": known / self.n,
            "ess_fraction": (proposal.total / self.n) * (proposal.total / spread),
            "largest_coefficient": proposal.total / proposal.count / proposal.smallest(w.lowest),
            "mean_age": float((age * lengths).sum() / lengths.sum()) if len(age) else math.nan,
            "max_age": float(age.max()) if len(age) else math.nan,
            "mean_weight": mean,
            "ideal_gain": squares / max(1, known) / mean**2 if mean else 1.0,
        }

    # Inside

    @property
    def _arrays(self) -> list[NDArray[np.generic]]:
        """Everything that changes."""
        return [*self._weights.arrays, *self._feedback.arrays, self.versions, self._age, self._out]

    def _proposal(self) -> Proposal:
        if self._settled is None:
            w = self._weights
            if self._ageing is None:
                self._ageing = Ageing(self.sampling, w.lengths, w.scored.chunks, self._age, self._out)
            self._settled = propose(self.sampling, self._ageing, w.sums.chunks, lambda: w.squares)
            if self._settled.blank and not self._warned:
                logger.warning("all weights are zero: drawing uniformly until a norm is not")
                self._warned = True
        return self._settled

    def _blended(self, former: NDArray[np.float32], fresh: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weights that fresh norms leave: root mean squares of what was and what is."""
        decay = self.sampling.ema_decay
        if not decay:
            return fresh
        squares = decay * np.square(former, dtype=np.float64) + (1.0 - decay) * np.square(fresh, dtype=np.float64)
        return np.where(np.isnan(former), fresh, np.sqrt(squares)).astype(np.float32)

    def _chunk_weights(self, chunk: int, proposal: Proposal) -> Floats:
        u = self._weights.raised(self._weights.chunk(chunk).astype(np.float64))
        u[np.isnan(u)] = proposal.fill
        return np.asarray(proposal.scale[chunk] * u + proposal.shift[chunk])

    def _checked(self, indices: ArrayLike) -> Integers:
        wanted = np.asarray(indices, np.int64)
        if wanted.ndim != 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= self.n)):
            raise DataError(f"got indices of shape {wanted.shape}, wanted (B,) in [0, {self.n}); check their source")
        return wanted

    def _check_chunk(self, chunk: int) -> None:
        if not 0 <= chunk < self.n_chunks:
            raise DataError(f"chunk: got {chunk}, wanted 0 to {self.n_chunks - 1}; was chunk_size changed?")

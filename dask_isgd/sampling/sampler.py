"""The importance sampler: it receives weights and draws minibatches, for any number of examples."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dask_isgd.config import Sampling
from dask_isgd.errors import ConfigError, DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.sampling.bad_norms import check_norms, is_bad
from dask_isgd.sampling.draws import Draw, Floats, Integers, positions, select_shared, uniform
from dask_isgd.sampling.example_ages import FRESHNESS, ExampleAges
from dask_isgd.sampling.proposal import ChunkStates, Proposal, flat, propose
from dask_isgd.sampling.sampler_stats import sampler_stats
from dask_isgd.sampling.tree_search import TreeSearch
from dask_isgd.sampling.weight_blocks import WeightBlocks

logger = logging.getLogger("dask_isgd.sampling")

_SLICE = 4096
"""Examples whose probabilities are computed at once."""
_NEARLY_ALL = 0.9
"""Share of the examples that count as all of them if weights come from feedback alone: two or three epochs."""


class ImportanceSampler:
    """Draws minibatches of N examples with probability proportional to smoothed, faded weights.

    The search has four levels: a minibatch selects chunks from cumulative chunk sums, groups of blocks inside them,
    blocks inside those, and examples inside blocks; each probability is the product of the selected shares. An
    update costs O(chunk), a draw O(batch × sqrt(chunk/64)), plus O(chunks) if a weight changed
    since the last draw. The sampler holds a float32 and a byte per example, and a fifth of that for the sums.

    A weight is the latest norm or, with ``ema_decay``, the root of m w² + (1 - m) ||g||², with m the smaller of
    ``ema_decay`` and exp(-t/``ema_steps``) for a w that is t steps older: norms fluctuate from one version to the next,
    and the best weight is the root of the expected square.

    A weight is as old as its chunk's scores, or as newer feedback for the example itself (``example_ages``), and fades
    by its own age. Time passes only at ``refresh``; the prior and the smoothing constant follow the weights at once,
    so that bounds on the coefficients hold for every draw. Formulas: ``dask_isgd.sampling.proposal``.
    The sampler is not thread-safe.
    """

    def __init__(self, n: int, chunk_size: int, sampling: Sampling) -> None:
        if n < 1:
            raise EmptyDatasetError(f"got {n} examples, wanted at least 1; check the dataset's sample dimension")
        if chunk_size < 1:
            raise DataError(f"chunk_size: got {chunk_size}, wanted at least 1; pass the scoring chunk's examples")
        self.n, self.chunk_size, self.sampling = n, min(chunk_size, n), sampling
        half_life = sampling.half_life_steps
        w = self._weights = WeightBlocks(n, self.chunk_size, sampling.exponent, faded=half_life is not None)
        self.n_chunks = len(w.lengths)
        self._ages = ExampleAges(w.codes, self.n_chunks, math.prod(w.fanouts), half_life)
        self.versions: Floats = np.full(self.n_chunks, np.nan)
        """(n_chunks,) version at which each chunk was last scored; NaN: never."""
        self._age: Floats = np.full(self.n_chunks, np.inf)
        self._left_out: NDArray[np.bool_] = np.zeros(self.n_chunks, bool)
        self._uniform: Proposal | None = None
        """The proposal of uniform draws once a chunk is left out."""
        self._step = 0
        self._chunks: ChunkStates | None = None
        self._current: Proposal | None = None
        """The proposal in force; None if something changed since it was computed."""
        self._warned = False
        self._bad_minibatches = 0

    @property
    def biased(self) -> bool:
        """Whether the ``drop`` policy is configured: estimates are then of the examples in use only."""
        return self.sampling.max_age_steps is not None and not self.sampling.uniform

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        held, current = [*self._arrays, self._weights.lengths], self._current
        if current is not None:
            held += [current.shift, current.edges]
        for chunks in (self._chunks, None if current is None else current.chunks):
            held += [] if chunks is None else [a for a in vars(chunks).values() if isinstance(a, np.ndarray)]
        return sum({id(array): array.nbytes for array in held}.values())

    # Draws

    def draw(self, batch: int, rng: np.random.Generator, scheme: str | None = None) -> Draw:
        """Draw ``batch`` examples from the proposal in force, by ``scheme`` or else by ``sampling.scheme``."""
        return self.draw_at(positions(scheme or self.sampling.scheme, batch, rng))

    def draw_at(self, at: Floats) -> Draw:
        """Return the examples that the proposal in force has at the positions (B,) in [0, 1) of ``draws.positions``."""
        if self.sampling.uniform:
            return self.draw_uniform_at(at)
        return self._search(self._proposal(), at)

    def _search(self, proposal: Proposal, at: Floats) -> Draw:
        chunks, q, fractions = select_shared(proposal.edges, at)
        indices = chunks * self.chunk_size
        search = TreeSearch(proposal, self._weights, chunks)
        for unit in self._weights.units:
            columns, shares, fractions = search.edges().select(fractions)
            q *= shares
            indices += columns * unit
            search.descend(columns)
        return Draw(indices, 1.0 / (proposal.count * q), q)

    def draw_uniform(self, batch: int, rng: np.random.Generator, scheme: str | None = None) -> Draw:
        """Draw ``batch`` examples, all equally probable except for those left out: coefficients 1."""
        return self.draw_uniform_at(positions(scheme or self.sampling.scheme, batch, rng))

    def draw_uniform_at(self, at: Floats) -> Draw:
        """Return the examples at the positions (B,) in [0, 1), all equally probable except for those left out."""
        return uniform(self.n, at) if self._uniform is None else self._search(self._uniform, at)

    def probabilities(self, indices: ArrayLike | None = None) -> Floats:
        """Return the probabilities q in force, float64: of ``indices`` (B,), or of all N if None (O(N)).

        They follow from the same sums that ``draw`` searches. An example of a dropped chunk has probability zero.
        """
        if indices is None:
            parts = (np.arange(start, min(self.n, start + _SLICE)) for start in range(0, self.n, _SLICE))
            return np.concatenate([self.probabilities(part) for part in parts])
        proposal = self._proposal()
        chunks, inside = np.divmod(self._checked(indices), self.chunk_size)
        q = proposal.shares()[chunks]
        search = TreeSearch(proposal, self._weights, chunks)
        for unit in self._weights.units:
            columns, inside = np.divmod(inside, unit)
            q *= search.edges().shares(columns)
            search.descend(columns)
        return q

    @property
    def uniform_share(self) -> float:
        """Share of the proposal that smoothing spreads evenly over the examples in use: 1 is a uniform proposal."""
        if self.sampling.uniform:
            return 1.0
        proposal = self._proposal()
        return min(1.0, proposal.constant * proposal.count / proposal.total)

    @property
    def total(self) -> float:
        """Σ s over all examples: q = s / Σ s, with the s of :meth:`weights`."""
        return self._proposal().total

    def all_known(self, since: int = 0) -> bool:
        """Return whether every chunk that can be drawn from was scored at version ``since`` or later.

        If none was ever scored: whether nine tenths of the examples were fed back.
        """
        if np.isnan(self.versions).all():
            chunks = self._states(Sampling(uniform=True))
            return chunks.known >= _NEARLY_ALL * chunks.count
        return bool(((self.versions >= since) | self._left_out).all())

    @property
    def from_feedback(self) -> bool:
        """Whether there are weights and all of them come from feedback, so that no weight array holds them."""
        return self._weights.unscored < self.n and bool(np.isnan(self.versions).all())

    def weights(self, chunk: int) -> Floats:
        """Return (chunk_len,) the proposal weights s in force, float64; zero in a dropped chunk."""
        self._check_chunk(chunk)
        proposal = self._proposal()
        return np.asarray(self._chunk_weights(chunk, proposal) * proposal.usable[chunk])

    def has_weight(self, indices: Integers) -> NDArray[np.bool_]:
        """Return (B,) whether each of ``indices`` (B,) was ever scored or fed back."""
        w = self._weights
        return np.asarray(~np.isnan(w.values.take(w.places(indices))))

    def leave_out(self, chunk: int) -> None:
        """Draw nothing from a chunk any more: from then on, estimates are of the mean over the others.

        Raises EmptyDatasetError if none is left.
        """
        self._check_chunk(chunk)
        self._left_out[chunk] = True
        if self._left_out.all():
            raise EmptyDatasetError(f"all {self.n_chunks} chunks were left out, wanted at least one to draw from")
        self._uniform = flat(self._states(Sampling(uniform=True)), all_zero=False)
        self._chunks = self._current = None

    # Weights

    def update(self, chunk: int, weights: ArrayLike, version: int) -> int:
        """Replace one chunk's weights with norms scored at ``version``; O(chunk).

        ``weights`` (chunk_len,): an example whose norm is NaN, infinite (in float32) or negative keeps its
        former weight; such norms are counted and logged. If they are more than one and more than 1 %,
        NonFiniteNormsError is raised and nothing changes. The caller orders updates: the last one counts.

        Weights from feedback at ``version`` or later are kept, to within a unit of the ages: a kept weight is never
        older than its chunk's version.

        Returns how many norms were NaN, infinite or negative, and therefore ignored.
        """
        self._check_chunk(chunk)
        former = self._weights.chunk(chunk)
        with np.errstate(over="ignore"):
            fresh = np.asarray(weights).astype(np.float32)
        if fresh.shape != former.shape:
            raise LengthMismatchError(
                f"chunk {chunk}: got weights of shape {fresh.shape}, wanted {former.shape}; pass one norm per example"
            )
        good = ~check_norms(fresh, f"chunk {chunk} at version {version}", chunk * self.chunk_size)
        bad = int(len(fresh) - good.sum())
        if bad:
            logger.warning("chunk %d at version %d: %d bad norms, former weights kept", chunk, version, bad)
        by_age = self.sampling.ema_steps is not None
        elapsed = self._ages.elapsed_of_chunk(chunk, version, len(fresh)) if by_age else None
        replaced = good & ~self._ages.rescore(chunk, version, len(fresh))
        self._weights.put(chunk, np.where(replaced, self._averaged(former, fresh, elapsed), former))
        self.versions[chunk] = version
        self._age[chunk] = max(0, self._step - version)
        self._chunks = self._current = None
        return bad

    def feedback(self, indices: ArrayLike, norms: ArrayLike, step: int) -> int:
        """Replace the weights of ``indices`` (B,) with norms (B,) from the learner's own pass at ``step``.

        The cost is O(blocks touched). Returns how many norms were NaN, infinite or negative, and therefore ignored.
        """
        wanted = self._checked(indices)
        with np.errstate(over="ignore"):
            fresh = np.asarray(norms).astype(np.float32)
        if fresh.shape != wanted.shape:
            raise LengthMismatchError(
                f"feedback: got norms of shape {fresh.shape} for indices of shape {wanted.shape}, "
                "wanted one norm per index; pass the whole minibatch"
            )
        good = ~is_bad(fresh)
        bad = 0 if good.all() else int(len(fresh) - good.sum())
        if bad:
            self._bad_minibatches += 1
            if str(self._bad_minibatches).rstrip("0") == "1":  # the 1st, 10th, 100th: not one line per step
                logger.warning(
                    "step %d: %d of %d norms of the minibatch are bad and ignored; such minibatches so far: %d",
                    *(step, bad, len(fresh), self._bad_minibatches),
                )
            wanted, fresh = wanted[good], fresh[good]
        if len(wanted):
            unscored = self._weights.unscored
            places = self._weights.places(wanted)
            # With fading, no weight may be newer than the time that its chunk's factor is computed for.
            dated = min(step, self._step) if self._weights.faded else step
            chunks = wanted // self.chunk_size
            by_age = self.sampling.ema_steps is not None
            elapsed = self._ages.elapsed(chunks, places, step) if by_age else None
            moved = self._ages.mark(chunks, places, dated)
            self._weights.scatter(places, self._averaged(self._weights.values[places], fresh, elapsed))
            for chunk in moved if self._weights.faded else ():
                self._weights.put(chunk, self._weights.chunk(chunk).copy())
            self._current = None
            if self._weights.unscored != unscored or moved:
                self._chunks = None
        return bad

    def refresh(self, step: int) -> None:
        """Set all ages to those at ``step``; once per publication, O(n_chunks)."""
        self._step = step
        self._age[:] = np.where(np.isnan(self.versions), np.inf, np.maximum(0.0, step - self.versions))
        self._chunks = self._current = None

    def stats(self, step: int) -> dict[str, float]:
        """Return plain floats about the proposal in force, described in ``sampler_stats``."""
        return sampler_stats(self._proposal(), self._weights, self.versions, step)

    # State

    def state(self) -> dict[str, Any]:
        """Return copies of what the proposal follows from, for :meth:`restore`: 5 bytes per example, 16 per chunk."""
        w, n = self._weights, self.n
        places = w.places(np.arange(n)) if len(w.values) != n else slice(None)
        return {
            "chunk_size": self.chunk_size,
            "half_life_steps": self.sampling.half_life_steps,
            "step": self._step,
            "weights": w.values[places].copy(),
            "ages": w.codes[places].copy(),
            "base": self._ages.base.copy(),
            "versions": self.versions.copy(),
            "left_out": self._left_out.copy(),
        }

    def restore(self, state: Mapping[str, Any], *, but: Sequence[int] | NDArray[np.int64] = ()) -> None:
        """Continue from ``state()``; the chunks ``but`` stay as they are, if they were updated before.

        Raises ConfigError if it has other chunks, or ages in other units.
        """
        kept = {"chunk_size": self.chunk_size, "half_life_steps": self.sampling.half_life_steps}
        for name, wanted in kept.items():
            if state[name] != wanted:
                raise ConfigError(
                    f"restore: got a state with {name} {state[name]}, wanted {wanted}; resume with the same"
                )
        w = self._weights
        others = np.setdiff1d(np.arange(self.n_chunks), but)
        self._ages.base[others], self.versions[others] = state["base"][others], state["versions"][others]
        for chunk in others.tolist():
            rows = slice(chunk * self.chunk_size, chunk * self.chunk_size + int(w.lengths[chunk]))
            w.chunk_codes(chunk)[:] = state["ages"][rows]
            w.put(chunk, state["weights"][rows])
        for chunk in np.flatnonzero(state["left_out"]).tolist():
            self.leave_out(chunk)
        self.refresh(state["step"])

    # Internals

    @property
    def _arrays(self) -> list[NDArray[np.generic]]:
        """Every array that changes."""
        return [*self._weights.arrays, self._ages.base, self.versions, self._age, self._left_out]

    def _proposal(self) -> Proposal:
        if self._current is None:
            if self._chunks is None:
                self._chunks = self._states(self.sampling)
            self._current = propose(self.sampling, self._chunks, self._weights)
            if self._current.all_zero and not self._warned:
                logger.warning("all weights are zero: draws are uniform until a norm is not")
                self._warned = True
        return self._current

    def _states(self, sampling: Sampling) -> ChunkStates:
        w, base_age = self._weights, self._step - self._ages.base
        return ChunkStates(sampling, w.lengths, w.scored.chunks, self._age, base_age, self._left_out)

    def _averaged(
        self, former: NDArray[np.float32], fresh: NDArray[np.float32], elapsed: Floats | None
    ) -> NDArray[np.float32]:
        """Return the new weights: roots of averages of former squares, ``elapsed`` steps older if age counts."""
        decay: float | Floats = self.sampling.ema_decay
        if not decay:
            return fresh
        if elapsed is not None and self.sampling.ema_steps is not None:
            decay = np.minimum(decay, np.exp(elapsed / -self.sampling.ema_steps))
        squares = decay * np.square(former, dtype=np.float64) + (1.0 - decay) * np.square(fresh, dtype=np.float64)
        return np.where(np.isnan(former), fresh, np.sqrt(squares)).astype(np.float32)

    def _chunk_weights(self, chunk: int, proposal: Proposal) -> Floats:
        w = self._weights
        u = w.to_power(w.chunk(chunk).astype(np.float64))
        if w.faded:
            r = FRESHNESS.take(w.chunk_codes(chunk))
            u = r * u + (1.0 - r) * proposal.prior
        u[np.isnan(u)] = proposal.prior
        return np.asarray(proposal.scale[chunk] * u + proposal.shift[chunk])

    def _checked(self, indices: ArrayLike) -> Integers:
        wanted = np.asarray(indices, np.int64)
        if wanted.ndim != 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= self.n)):
            raise DataError(f"got indices of shape {wanted.shape}, wanted (B,) in [0, {self.n}); check their source")
        return wanted

    def _check_chunk(self, chunk: int) -> None:
        if not 0 <= chunk < self.n_chunks:
            raise DataError(f"chunk: got {chunk}, wanted 0 to {self.n_chunks - 1}; was chunk_size changed?")

"""How often the learner computes the norms of its own minibatch: as often as a part of its time allows.

A small model's norms cost a fifth of its step, a transformer's up to half. Beside scores, those of every second or
third minibatch serve nearly as well. Where nothing is scored they are all that is known: on Fashion-MNIST those of
every second minibatch instead of all saved a twentieth of the time, and the final loss was 0.093 instead of 0.058.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from statistics import median

BESIDE_SCORES, ALONE = 0.1, 0.3
"""The shares of a step's time that norms may cost on average."""
_LONGEST = 8
"""Steps between two minibatches with norms, at most."""
_SAMPLES = 5
"""Blocks of steps with norms, and as many without, that are timed."""
_AGAIN = 5000
"""Steps after which they are timed again: other processes come and go."""


class FeedbackPace:
    """Chooses the steps whose norms are computed.

    Blocks of steps are timed with and without norms, in turn; then norms are computed at every ``every``-th step.
    ``alone`` says whether all weights come from them at the moment. ``fixed``: at every step, whatever they cost.
    """

    def __init__(self, *, fixed: bool = False, alone: Callable[[], bool] = lambda: False) -> None:
        self.every = 1
        self._cost = 0.0
        """Of norms, as a share of the time of a step without them."""
        self._fixed, self._alone = fixed, alone
        self._samples: dict[bool, list[float]] = {True: [], False: []}
        self._trial = not fixed
        self._with_norms = True
        self._decided = 0

    def norms(self, step: int) -> bool:
        """Whether the norms of ``step`` are computed."""
        if self._trial:
            return self._with_norms
        return step % self.every == 0

    def took(self, step: int, seconds: float) -> None:
        """Learn how many ``seconds`` per step the block took that ends before ``step``, none of it a measured step."""
        if self._fixed:
            return
        if not self._trial:
            self._trial = step - self._decided >= _AGAIN
            self._choose()
            return
        self._samples[self._with_norms].append(seconds)
        self._with_norms = not self._with_norms
        if min(map(len, self._samples.values())) >= _SAMPLES:
            with_norms, without = median(self._samples[True]), median(self._samples[False])
            self._cost = with_norms / max(without, 1e-9) - 1.0
            self._choose()
            self._samples = {True: [], False: []}
            self._trial, self._with_norms, self._decided = False, True, step

    def _choose(self) -> None:
        share = ALONE if self._alone() else BESIDE_SCORES
        self.every = min(max(ceil(self._cost / share), 1), _LONGEST)

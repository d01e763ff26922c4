"""How many of the workers that can learn do more for a run if they score. Pure: no torch, no Dask, no clock.

A run with gain g, whose steps take t seconds, progresses by about g^VALUE / t per second. One learner fewer makes steps
longer: the same computing is shared by fewer, though they wait for one another no longer than before, and a single
learner for nobody. Scores bring the gain nearer to that of ideal weights. So where learners share their work well, all
learn, and where most of a step is waiting (a slow link, a small model), some do better as scorers.

What was tried is judged by what was measured. What wasn't is predicted with favour, as trying costs little: a change
takes seconds, and what failed is left alone for twenty times as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

VALUE = 0.5
"""A gain of g saves updates as g^VALUE does: between 0.4 and 0.7 in the runs of ``benchmarks/devices.py``."""
MARGIN = 1.1
"""A change has to promise so many times the present progress, twice in a row: it takes a while itself."""
AGAIN = 20
"""What was measured is forgotten after so many times as long as measuring it took, as links and machines change: trying
again takes a twentieth of the time at most."""


@dataclass(frozen=True)
class Measured:
    """What was measured with some number of scorers."""

    seconds: float
    """Of a step."""
    computing: float
    """Seconds of these in which rank 0 computed; in the others it waited, mostly for other ranks."""
    share: float
    """The gain over the ideal gain."""

    @property
    def waiting(self) -> float:
        """The rest of these seconds."""
        return self.seconds - self.computing

    def progress(self, ideal_gain: float) -> float:
        """Return the progress per second, in any unit."""
        return float((self.share * ideal_gain) ** VALUE / self.seconds)


class Choice(NamedTuple):
    """How many workers are to score that could learn, and why."""

    scorers: int
    worth: float
    """The best other choice's progress per second over the present one's; NaN if there is none or nothing measured."""
    reason: str


class Roles:
    """Judges now and then what is best for a run."""

    def __init__(self) -> None:
        self._tried: dict[tuple[int, int], tuple[float, Measured]] = {}
        """By workers and scorers: until when it counts, and what was measured last."""
        self._present: tuple[int, int] | None = None
        self._judged: float | None = None
        self._began = 0.0
        """When the present roles began, at the latest."""
        self._took: float | None = None
        """How long it took from there until they were measured."""
        self._wish: int | None = None
        """What the latest measurement spoke for."""

    def judge(
        self, workers: int, scorers: int, most: int, now: Measured | None, *, at: float, ideal_gain: float, pays: bool
    ) -> Choice:
        """Return how many of ``workers`` that can learn are to score, ``most`` at most, where now ``scorers`` do.

        ``now``: what was measured since the roles are these; None: nothing. ``at``: the time in seconds. ``pays``:
        whether draws follow the weights.
        """
        if self._present != (workers, scorers):
            self._present, self._took = (workers, scorers), None
            self._began = at if self._judged is None else self._judged
        self._judged = at
        if not pays:
            return Choice(0, math.nan, "all learn: draws do not follow the weights")
        if most < 1:
            return Choice(0, math.nan, "all learn: no worker has a choice")
        if now is None or not (now.computing > 0 and now.share > 0 and math.isfinite(ideal_gain)):
            return Choice(min(scorers, most), math.nan, "nothing is measured yet")
        self._took = at - self._began if self._took is None else self._took
        self._tried = {roles: each for roles, each in self._tried.items() if at < each[0]}
        self._tried[workers, scorers] = at + AGAIN * self._took, now
        others = {
            other: self._expected(workers, scorers, other, now).progress(ideal_gain) / now.progress(ideal_gain)
            for other in range(most + 1)
            if other != scorers
        }
        best = max(others, key=lambda other: others[other])
        wish, self._wish = self._wish, best if others[best] > MARGIN else scorers
        chosen = self._wish if self._wish == wish else scorers  # figures are noisy: twice in a row
        return Choice(chosen, others[best], self._reason(workers, chosen, best, others[best], now))

    def _expected(self, workers: int, scorers: int, other: int, now: Measured) -> Measured:
        """Return what was measured with ``other`` scorers, or is to be expected."""
        if (workers, other) in self._tried:
            return self._tried[workers, other][1]
        computing = now.computing * (workers - scorers)
        if workers - other == 1:
            waiting = 0.0
        elif workers - scorers > 1:
            waiting = now.waiting
        else:  # as when several learned
            waiting = min((m.waiting for (n, k), (_, m) in self._tried.items() if n - k > 1), default=0.0)
        computing /= workers - other
        share = now.share if scorers or not other else (1.0 + now.share) / 2.0
        return Measured(computing + waiting, computing, share)

    def _reason(self, workers: int, chosen: int, best: int, worth: float, now: Measured) -> str:
        step = f"steps of {1000 * now.seconds:.3g} ms, {now.waiting / now.seconds:.0%} of it waiting"
        seen = f"{step}, with {now.share:.0%} of the ideal gain"
        what = "that" if chosen == best else _of(best, workers)
        return f"{_of(chosen, workers)}: {what} promises {worth:.2f} times the progress ({seen})"


def _of(scorers: int, workers: int) -> str:
    return f"{scorers} of {workers} score" if scorers else f"all {workers} learn"

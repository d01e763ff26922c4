"""How many scorers are worth having: a controller without a cluster, a clock or a thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dask_isgd.errors import ConfigError


@dataclass(frozen=True)
class Pays:
    """What a run says of its sampling: all of it is in its ``progress`` events."""

    open: bool
    """Whether the gate is open."""
    gain: float
    """Second moment of uniform draws over that of the proposal in force."""
    ideal: float
    """The same for weights that are never stale."""


class Need:
    """Climbs: more scorers while staleness costs gain and more of them have brought some, else fewer.

    Asked at any time, it changes its mind at most once in ``settle`` seconds, in which new scorers
    refresh the weights. An increase that brought less than ``least_rise`` of gain is taken back and
    not tried again for ``hold`` seconds. While every gate is shut one scorer goes on probing.
    """

    def __init__(self, *, settle: float = 30.0, hold: float = 300.0, least_rise: float = 0.02) -> None:
        if not (0 < settle <= hold and least_rise >= 0):
            raise ConfigError(f"got settle={settle}, hold={hold}, least_rise={least_rise}; wanted 0 < settle <= hold")
        self.settle, self.hold, self.least_rise = settle, hold, least_rise
        self._decided = -math.inf
        self._not_before = -math.inf
        self._raised: tuple[int, float] | None = None
        """Scorers and gain before the last increase, while its effect is awaited."""

    def wanted(self, now: float, scorers: int, runs: Sequence[Pays]) -> int:
        """Scorers to have at time ``now`` (seconds), where there are ``scorers`` now."""
        open_runs = [run for run in runs if run.open and math.isfinite(run.gain) and run.ideal >= 1]
        if not open_runs:
            self._raised = None
            # a gate not yet judged needs fresh weights to be judged by; a shut one needs a probe
            return 1 if runs and not any(run.open for run in runs) else max(1, scorers)
        if now - self._decided < self.settle:
            return scorers
        self._decided = now
        gain = math.exp(sum(math.log(max(run.gain, 1e-3)) for run in open_runs) / len(open_runs))
        if self._raised is not None:
            before, former = self._raised
            self._raised = None
            if scorers > before and gain < former * (1 + self.least_rise):
                self._not_before = now + self.hold
                return before
        lost = max(1 - run.gain / run.ideal for run in open_runs)
        if lost > 0.1 and now >= self._not_before:
            self._raised = scorers, gain
            return max(scorers + 1, math.ceil(1.5 * scorers))
        return max(1, scorers - 1) if lost < 0.02 else max(1, scorers)

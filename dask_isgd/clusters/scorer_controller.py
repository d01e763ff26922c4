"""How many scorers a cluster should have: a controller without a cluster, a clock or a thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dask_isgd.errors import ConfigError


@dataclass(frozen=True)
class GainReport:
    """What a run's latest ``progress`` event reports about its sampling."""

    open: bool
    """Whether the gate is open."""
    gain: float
    """Second moment of uniform draws over that of the proposal in force."""
    ideal: float
    """The same for weights that are never stale."""


class ScorerController:
    """Hill climbing: more scorers while staleness costs gain and adding scorers has helped, otherwise fewer.

    It can be asked at any time, but changes the number at most once per ``settle`` seconds, in which new
    scorers refresh the weights. An increase that raised the gain by less than ``least_rise`` is undone and
    not tried again for ``hold`` seconds. While every gate is closed, one scorer stays to probe.
    """

    def __init__(self, *, settle: float = 30.0, hold: float = 300.0, least_rise: float = 0.02) -> None:
        if not (0 < settle <= hold and least_rise >= 0):
            raise ConfigError(f"got settle={settle}, hold={hold}, least_rise={least_rise}; wanted 0 < settle <= hold")
        self.settle, self.hold, self.least_rise = settle, hold, least_rise
        self._decided = -math.inf
        self._not_before = -math.inf
        self._raised: tuple[int, float] | None = None
        """Scorers and gain before the last increase, until its effect is known."""

    def target(self, now: float, scorers: int, reports: Sequence[GainReport]) -> int:
        """Return the number of scorers to have at time ``now`` (seconds), if there are ``scorers`` now."""
        open_runs = [report for report in reports if report.open and math.isfinite(report.gain) and report.ideal >= 1]
        if not open_runs:
            self._raised = None
            # a gate that has not decided yet needs fresh weights; a closed one needs a probe
            return 1 if reports and not any(report.open for report in reports) else max(1, scorers)
        if now - self._decided < self.settle:
            return scorers
        self._decided = now
        gain = math.exp(sum(math.log(max(report.gain, 1e-3)) for report in open_runs) / len(open_runs))
        if self._raised is not None:
            before, former = self._raised
            self._raised = None
            if scorers > before and gain < former * (1 + self.least_rise):
                self._not_before = now + self.hold
                return before
        lost = max(1 - report.gain / report.ideal for report in open_runs)
        if lost > 0.1 and now >= self._not_before:
            self._raised = scorers, gain
            return max(scorers + 1, math.ceil(1.5 * scorers))
        return max(1, scorers - 1) if lost < 0.02 else max(1, scorers)

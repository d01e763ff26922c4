"""Whether importance sampling pays: draws are uniform until its measured gain shows that it does."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dask_isgd.config import Sampling
from dask_isgd.sampling.schedule import PROBE_SHARE

DECAY = 0.8
"""Share of the average that each new observation leaves in place."""
OPENS_AFTER = 5
"""Observations before the gate may open."""
CLOSES_AFTER = 4
"""Reports in a row, each with too small a gain of its own, after which an open gate closes."""
PROBES_AFTER = 20
"""Observations with all weights known before a closed gate reduces scoring to a probe."""
WELL_ABOVE = 4.0
"""The ideal gain's excess over 1, in units of that at which the gate opens, for which a probe is not enough."""
STATES = ("uniform by configuration", "open by configuration", "measuring", "closed: does not pay", "open: pays")
"""The states that ``Gate.code`` numbers: a column of the history shows why draws are as they are."""
MEASURING, PROBING = 2, 3


class Gate:
    """Opens if the smoothed gain exceeds ``gate_gain``, and closes if it falls below half-way from it to 1.

    The gain is the candidate proposal's, measured whatever the draws are: otherwise a closed gate
    could never open. Its logarithm is smoothed, so that a gain of 2 and one of 1/2 cancel. A proposal that covers
    only part of the data cannot show that importance sampling does not pay.

    An open gate also closes if each of the last four reports, taken alone, shows too small a gain. An average of
    second moments is dominated for long by the largest of them, and these belong to the past when norms become equal.

    While the gate is closed, only a probe is scored. If the curves then show an ideal gain well above the threshold,
    all chunks are scored and measured again. Each attempt that fails is followed by a wait of twenty times its length.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.forced_open = sampling.gate == "open" and not sampling.uniform
        self.forced_closed = sampling.uniform
        self.opens_above = float(sampling.gate_gain)
        self.closes_below = (1.0 + self.opens_above) / 2.0
        self.measures_above = 1.0 + WELL_ABOVE * max(self.opens_above - 1.0, 0.05)
        """Ideal gain above which a closed gate has all chunks scored again."""
        self.scored_since = 0
        """Scores of this version or later count in the current measurement."""
        self._open = self.forced_open
        self._log_gain = 0.0
        self._observations = self._complete_observations = 0
        self._since = 0
        self._reports = 0
        """Reports in the current state, as numbered by ``code``."""
        self._small = 0
        """Latest reports in a row whose own gain is too small."""
        self._wait = PROBES_AFTER
        """Reports after which a probe may give way to another measurement."""

    @property
    def open(self) -> bool:
        """Whether minibatches are drawn from the proposal, not uniformly."""
        return self._open

    @property
    def probing(self) -> bool:
        """Whether importance sampling was measured and does not pay: scoring only needs to notice when it does."""
        return not self._open and not self.forced_closed and self._complete_observations >= PROBES_AFTER

    @property
    def gain(self) -> float:
        """The smoothed gain; NaN before the first observation."""
        # Dividing by 1 - DECAY^n removes the pull of the zero that the average started from.
        return math.exp(self._log_gain / (1.0 - DECAY**self._observations)) if self._observations else math.nan

    @property
    def code(self) -> int:
        """The current state as an index of ``STATES``."""
        if self.forced_closed:
            return 0
        if self.forced_open:
            return 1
        if self._open:
            return 4
        return PROBING if self.probing else MEASURING

    @property
    def reason(self) -> str:
        """A description of the current state for people."""
        if self.forced_closed or self.forced_open:
            return STATES[self.code]
        if self._open:
            return f"open since step {self._since}: gain {self.gain:.2f}, closes below {self.closes_below:.2f}"
        if not self.probing:
            again = f" again since step {self.scored_since}" if self.scored_since else ""
            return f"measuring{again}, {self._complete_observations} of {PROBES_AFTER} reports with all weights known"
        return f"closed since step {self._since}: gain {self.gain:.2f}, opens above {self.opens_above:.2f}"

    def observe(
        self, gain: float, step: int, *, latest: float = math.nan, ideal: float = math.nan, all_known: bool = True
    ) -> None:
        """Add the report of ``step``.

        ``gain``: the candidate's, averaged over reports; ``latest``: its gain in this report alone; ``ideal``: the gain
        of the best possible proposal. What is not finite and positive is ignored. ``all_known``: every chunk was
        scored at version ``scored_since`` or later, or else fed back.
        """
        before = self.code
        self._reports += 1
        if math.isfinite(gain) and gain > 0:
            self._complete_observations += all_known
            self._log_gain = DECAY * self._log_gain + (1.0 - DECAY) * math.log(gain)
            self._observations += 1
            self._small = self._small + 1 if 0 < latest < self.closes_below else 0
            self._decide(step, latest if latest > 0 else gain)
        if before == self.code == PROBING and self._reports >= self._wait and ideal > self.measures_above:
            self.scored_since, self._complete_observations = step + 1, 0
        if before == MEASURING and self.code == PROBING and self.scored_since:
            self._wait = round(self._reports / PROBE_SHARE)
        if before != self.code:
            self._reports = 0

    def _decide(self, step: int, latest: float) -> None:
        if self.forced_open or self.forced_closed:
            return
        known = self._observations >= OPENS_AFTER
        opens = not self._open and known and self.gain > self.opens_above
        closes = self._open and ((known and self.gain < self.closes_below) or self._small >= CLOSES_AFTER)
        if not (opens or closes):
            return
        self._open, self._since, self._small, self._wait = opens, step, 0, PROBES_AFTER
        if closes:  # what was averaged before belongs to the past
            self._log_gain, self._observations = (1.0 - DECAY) * math.log(latest), 1

    def state(self) -> dict[str, float]:
        """Return plain numbers, for :meth:`restore`."""
        return {
            "open": float(self._open),
            "log": self._log_gain,
            "seen": float(self._observations),
            "whole": float(self._complete_observations),
            "since": float(self._since),
            "scored_since": float(self.scored_since),
            "reports": float(self._reports),
            "small": float(self._small),
            "wait": float(self._wait),
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from ``state()``; a gate whose state is configured keeps that state."""
        self._log_gain, self._since = float(state["log"]), int(state["since"])
        self._observations, self._complete_observations = int(state["seen"]), int(state["whole"])
        self.scored_since, self._reports = int(state["scored_since"]), int(state["reports"])
        self._small, self._wait = int(state["small"]), int(state["wait"])
        self._open = self.forced_open or (bool(state["open"]) and not self.forced_closed)

"""Whether importance sampling pays: draws are uniform until its measured gain shows that it does."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dask_isgd.config import Sampling

DECAY = 0.8
"""Share of the average that each new observation leaves in place."""
OPENS_AFTER = 5
"""Observations before the gate may open."""
PROBES_AFTER = 20
"""Observations with every chunk scored before a closed gate reduces scoring to the probe chunks."""
STATES = ("uniform by configuration", "open by configuration", "measuring", "closed: does not pay", "open: pays")
"""The states that ``Gate.code`` numbers: a column of the history shows why draws are as they are."""


class Gate:
    """Opens if the smoothed gain exceeds ``gate_gain``, and closes if it falls below half-way from it to 1.

    The gain is the candidate proposal's, measured whatever the draws are: otherwise a closed gate
    could never open. Its logarithm is smoothed, so that a gain of 2 and one of 1/2 cancel. A proposal that covers
    only part of the data cannot show that importance sampling does not pay.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.forced_open = sampling.gate == "open" and not sampling.uniform
        self.forced_closed = sampling.uniform
        self.opens_above = float(sampling.gate_gain)
        self.closes_below = (1.0 + self.opens_above) / 2.0
        self._open = self.forced_open
        self._log_gain = 0.0
        self._observations = self._complete_observations = 0
        self._since = 0

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
        return 3 if self.probing else 2

    @property
    def reason(self) -> str:
        """A description of the current state for people."""
        if self.forced_closed or self.forced_open:
            return STATES[self.code]
        if self._open:
            return f"open since step {self._since}: gain {self.gain:.2f}, closes below {self.closes_below:.2f}"
        if not self.probing:
            return f"measuring, {self._complete_observations} of {PROBES_AFTER} observations with all chunks scored"
        return f"closed since step {self._since}: gain {self.gain:.2f}, opens above {self.opens_above:.2f}"

    def observe(self, gain: float, step: int, *, all_scored: bool = True) -> None:
        """Add the gain measured at ``step``; ignore one that is not finite and positive.

        ``all_scored``: every chunk has been scored.
        """
        if not (math.isfinite(gain) and gain > 0):
            return
        self._complete_observations += all_scored
        self._log_gain = DECAY * self._log_gain + (1.0 - DECAY) * math.log(gain)
        self._observations += 1
        if self.forced_open or self.forced_closed or self._observations < OPENS_AFTER:
            return
        opens = not self._open and self.gain > self.opens_above
        closes = self._open and self.gain < self.closes_below
        if opens or closes:
            self._open, self._since = opens, step

    def state(self) -> dict[str, float]:
        """Return plain numbers, for :meth:`restore`."""
        counts = {"seen": float(self._observations), "whole": float(self._complete_observations)}
        return {"open": float(self._open), "log": self._log_gain, **counts, "since": float(self._since)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from ``state()``; a gate whose state is configured keeps that state."""
        self._log_gain, self._since = float(state["log"]), int(state["since"])
        self._observations, self._complete_observations = int(state["seen"]), int(state["whole"])
        self._open = self.forced_open or (bool(state["open"]) and not self.forced_closed)

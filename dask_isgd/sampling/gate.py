"""Whether importance sampling pays: uniform draws until its measured gain says so."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dask_isgd.config import Sampling

KEPT = 0.8
"""Share of the past each observation keeps."""
LEAST = 5
"""Observations before the gate may open."""
SETTLED = 20
"""Observations with every chunk scored before a closed gate leaves the scorers in peace."""
STATES = ("uniform was asked for", "kept open", "measuring", "closed: does not pay", "open: pays")
"""What ``Gate.code`` counts: the column of the history that says why draws are as they are."""


class Gate:
    """Opens where the smoothed gain exceeds ``gate_gain``, closes where it falls below half-way from it to 1.

    The gain is of the candidate proposal, measured whatever is being drawn: otherwise a closed gate
    could never open. It is smoothed as a logarithm, so that a gain of 2 and one of 1/2 cancel. That
    importance sampling does not pay is not concluded from a proposal that knows a part of the data only.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.always = sampling.gate == "open" and not sampling.uniform
        self.never = sampling.uniform
        self.opens_above = float(sampling.gate_gain)
        self.closes_below = (1.0 + self.opens_above) / 2.0
        self._open = self.always
        self._log = 0.0
        self._seen = self._whole = 0
        self._since = 0

    @property
    def open(self) -> bool:
        """True: draw from the proposal; False: uniformly."""
        return self._open

    @property
    def probing(self) -> bool:
        """True: importance sampling was measured and does not pay, so that scoring is only to notice when it does."""
        return not self._open and not self.never and self._whole >= SETTLED

    @property
    def gain(self) -> float:
        """The smoothed gain; NaN before the first observation."""
        # Dividing by 1 - KEPT^n removes the pull of the zero the average started from.
        return math.exp(self._log / (1.0 - KEPT**self._seen)) if self._seen else math.nan

    @property
    def code(self) -> int:
        """The present state as an index of ``STATES``."""
        if self.never:
            return 0
        if self.always:
            return 1
        if self._open:
            return 4
        return 3 if self.probing else 2

    @property
    def why(self) -> str:
        """A few words on the present state, for people."""
        if self.never:
            return "uniform was asked for"
        if self.always:
            return "kept open by the configuration"
        if self._open:
            return f"open since step {self._since}: gain {self.gain:.2f}, closes below {self.closes_below:.2f}"
        if not self.probing:
            return f"measuring, {self._whole} of {SETTLED} observations with all chunks scored"
        return f"closed since step {self._since}: gain {self.gain:.2f}, opens above {self.opens_above:.2f}"

    def observe(self, gain: float, step: int, *, whole: bool = True) -> None:
        """Take in the gain measured at ``step``; one that is not finite and positive says nothing.

        ``whole``: every chunk has been scored.
        """
        if not (math.isfinite(gain) and gain > 0):
            return
        self._whole += whole
        self._log = KEPT * self._log + (1.0 - KEPT) * math.log(gain)
        self._seen += 1
        if self.always or self.never or self._seen < LEAST:
            return
        opens = not self._open and self.gain > self.opens_above
        closes = self._open and self.gain < self.closes_below
        if opens or closes:
            self._open, self._since = opens, step

    def state(self) -> dict[str, float]:
        """Plain numbers to go on from."""
        counts = {"seen": float(self._seen), "whole": float(self._whole), "since": float(self._since)}
        return {"open": float(self._open), "log": self._log, **counts}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from ``state()``; a gate held open or shut by the configuration stays so."""
        self._log, self._since = float(state["log"]), int(state["since"])
        self._seen, self._whole = int(state["seen"]), int(state.get("whole", 0))
        self._open = self.always or (bool(state["open"]) and not self.never)

"""How much is scored: all there is room for, or a twentieth of the scorers' time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_isgd.coordinator.score_budget import may_start
from dask_isgd.errors import DataError
from dask_isgd.sampling.schedule import PROBE_SHARE


@pytest.mark.parametrize(
    ("slots", "in_flight", "probe", "allowed"),
    [
        pytest.param(8, 3, None, 5, id="open: every free slot"),
        pytest.param(8, 9, None, 0, id="open: scorers left"),
        pytest.param(0, 0, None, 0, id="no scorers"),
        pytest.param(8, 0, (0.0, 1.0, 1.0), 0, id="probing: a task would be more than its share of what has passed"),
        pytest.param(8, 0, (0.0, 2.5, 1.0), 1, id="probing: now it is a twentieth"),
        pytest.param(8, 1, (0.0, 99.0, 1.0), 0, id="probing: one at a time"),
        pytest.param(8, 0, (4.1, 10.0, 0.0), 0, id="probing: overspent"),
        pytest.param(0, 0, (0.0, 99.0, 0.0), 0, id="probing without scorers"),
    ],
)
def test_may_start(slots, in_flight, probe, allowed):
    settings = {}
    if probe is not None:
        settings = dict(zip(("busy_seconds", "elapsed_seconds", "task_seconds"), probe, strict=True))
    assert may_start(slots, in_flight, probing=probe is not None, **settings) == allowed


@given(
    slots=st.integers(1, 64),
    seconds=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=50),
    poll=st.floats(0.01, 1.0),
)
def test_a_probe_never_takes_more_than_a_twentieth_of_the_scorers_time(slots, seconds, poll):
    """Tasks as long as was said: at the end of each, the share is kept."""
    now, busy, running_until = 0.0, 0.0, None
    waiting = list(seconds)
    for _ in range(4000):
        if running_until is not None and now >= running_until:
            running_until = None
        started = may_start(
            slots,
            int(running_until is not None),
            probing=True,
            busy_seconds=busy,
            elapsed_seconds=now,
            task_seconds=waiting[0],
        )
        if started:
            running_until = now + waiting[0]
            busy += waiting.pop(0)
            assert busy <= PROBE_SHARE * slots * running_until + 1e-9
        if not waiting:
            break
        now += poll


def test_mistakes_are_named():
    with pytest.raises(DataError, match="busy_seconds: got -1"):
        may_start(1, 0, probing=True, busy_seconds=-1.0)

"""Several runs share the scorers of one cluster in equal parts."""

from __future__ import annotations

import time

import pytest
from distributed import Client

from dask_isgd.coordinator.fair_share import TOPIC, FairShare, part
from dask_isgd.events import ShareClaim
from dask_isgd.runtime.pubsub import announce

WAIT = 120


@pytest.mark.parametrize(
    ("room", "runs", "parts"),
    [
        (8, "a", [8]),
        (8, "ab", [4, 4]),
        (8, "abc", [3, 3, 2]),
        (2, "abc", [1, 1, 1]),  # none starves: they are served in turn
        (0, "ab", [0, 0]),
    ],
)
def test_parts(room, runs, parts):
    assert [part(room, run, set(runs)) for run in runs] == parts
    assert [part(room, run, set(runs) - {run}) for run in runs] == parts, "whether or not it receives its own claim"


def test_a_run_that_stops_claiming_is_left_out(client: Client):
    now = 0.0
    mine = FairShare(client, client, "b", clock=lambda: now).open()
    try:
        assert mine.share(8) == 8
        announce(client, TOPIC, ShareClaim(run="a", incarnation=0))
        deadline = time.monotonic() + WAIT
        while mine.share(8) != 4:
            assert time.monotonic() < deadline
        now = 4.9
        assert mine.share(8) == 4
        now = 5.1
        assert mine.share(8) == 8
    finally:
        mine.close()

"""Versions that cannot be published: who is told."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from dask_isgd.errors import LeaseLostError
from dask_isgd.learner import publisher as publishing
from dask_isgd.learner.publisher import Publisher

WAIT = 30
MODEL = torch.nn.Linear(2, 1)


class Announcer:
    run = "r"

    def __init__(self) -> None:
        self.versions, self.faults = [], []

    def published(self, version, *, checkpoint, final, holder):
        self.versions.append((version, holder))

    def fault(self, what, detail):
        self.faults.append(detail)


class Lease:
    incarnation = 1
    lost = False

    def check(self):
        if self.lost:
            raise LeaseLostError("fenced")


@pytest.fixture
def publish(monkeypatch):
    """Publish a list of versions; each of them is an error, or None for one that arrives."""

    def run(outcomes, **settings):
        announcer, lease, outcomes = Announcer(), Lease(), iter(outcomes)

        def send(*_, worker, **__):
            error = next(outcomes)
            if error is not None:
                raise error
            return SimpleNamespace(future=worker)

        monkeypatch.setattr(publishing, "publish", send)
        made = Publisher(None, "v", announcer, lease, dtype=None, timeout=WAIT, **settings).open()
        return made, announcer, lease

    return run


def test_a_loop_loses_versions_and_is_told_once_per_outage(publish, caplog):
    outcomes = [None, OSError("gone"), RuntimeError("closed"), TimeoutError(), None, OSError("again")]
    made, announcer, _ = publish(outcomes, lossy=True, holder=lambda: "tcp://a")
    with caplog.at_level(logging.WARNING, "dask_isgd"):
        for version in range(6):
            made.offer(MODEL, version)
            made.finish()
    made.close()
    assert announcer.versions == [(0, "tcp://a"), (4, "tcp://a")]
    assert len(announcer.faults) == 4
    said = [record.message for record in caplog.records if "scores get older until one is" in record.message]
    assert ["gone" in said[0], "again" in said[1], len(said)] == [True, True, 2]


def test_a_learner_tolerates_a_while_what_its_cluster_may_mend_and_nothing_else(publish):
    made, announcer, _ = publish([OSError("gone"), RuntimeError("wrong")])
    made.offer(MODEL, 0)
    made.finish()
    made.offer(MODEL, 1)
    with pytest.raises(RuntimeError, match="wrong"):
        made.finish()
    made.close()
    assert announcer.faults == ["version 0: OSError: gone"]


@pytest.mark.parametrize("settings", [{"strict": True}, {"lossy": True}], ids=str)
def test_a_lease_that_is_lost_is_an_error_for_everybody(publish, settings):
    made, announcer, lease = publish([None], **settings)
    lease.lost = True
    made.offer(MODEL, 0)
    with pytest.raises(LeaseLostError, match="fenced"):
        made.finish()
    made.close()
    assert announcer.versions == []


def test_versions_that_nobody_waits_for_are_published_once_a_second(publish, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(publishing.time, "monotonic", lambda: now[0])
    made, announcer, _ = publish([None] * 3)
    monkeypatch.setattr(type(made._pauses), "over", True)
    for version, (clock, wanted, ready) in enumerate(
        [(100.0, False, True), (100.9, False, False), (100.9, True, True), (101.8, False, False), (101.9, False, True)]
    ):
        now[0] = clock
        assert made.is_ready(wanted=wanted) is ready
        if ready:
            made.offer(MODEL, version)
            made.finish()
    made.close()
    assert [version for version, _ in announcer.versions] == [0, 2, 4]

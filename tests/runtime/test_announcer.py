"""Each event of a long task, with the run, role and incarnation filled in."""

from __future__ import annotations

import pytest
from fake_worker import FakeWorker

from dask_isgd.events import (
    Ended,
    Evaluated,
    Fault,
    Group,
    Heartbeat,
    Progress,
    Published,
    Scored,
    WeightSummary,
    topic_of,
)

RUN = {"run": "r", "incarnation": 2}
HOST = FakeWorker.address
SUMMARY = {
    "cells": [1],
    "chunks": 1,
    "never": 0,
    "age_high": 1.0,
    "age_counts": [1],
    "weight_low": 0.0,
    "weight_high": 1.0,
    "weight_counts": [1],
    "zeros": 0,
    "sampled": 1,
    "top_share": None,
}


@pytest.mark.parametrize(
    ("announce", "event"),
    [
        (
            lambda a: a.published(32, checkpoint="step-000000010-i0001", final=True),
            Published(**RUN, version=32, address=HOST, checkpoint="step-000000010-i0001", final=True),
        ),
        (
            lambda a: a.progress(20, 40, {"loss": 0.5}, gate_open=True, probing=False, why="pays"),
            Progress(
                **RUN, step=20, steps=40, address=HOST, open=True, probing=False, why="pays", values={"loss": 0.5}
            ),
        ),
        (
            lambda a: a.group([HOST, "tcp://b:1"], scorers=1, why="it pays"),
            Group(**RUN, learners=[HOST, "tcp://b:1"], scorers=1, why="it pays"),
        ),
        (
            lambda a: a.scored([[0, 1, 32]], examples=10, per_second=3.5),
            Scored(**RUN, chunks=[[0, 1, 32]], examples=10, per_second=3.5),
        ),
        (  # a version of the learner's incarnation, not of the coordinator's own
            lambda a: a.evaluated(5, 32, loss=0.5, error=0.1),
            Evaluated(run="r", incarnation=5, version=32, loss=0.5, error=0.1),
        ),
        (lambda a: a.weight_summary(20, SUMMARY), WeightSummary(**RUN, step=20, **SUMMARY)),
        (lambda a: a.fault("score", "chunk 3"), Fault(**RUN, what="score", detail="chunk 3")),
        (lambda a: a.heartbeat(), Heartbeat(**RUN, role="learner", address=HOST)),
        (
            lambda a: a.ended("stopped", 20, "why"),
            Ended(**RUN, attempt=7, role="learner", outcome="stopped", step=20, message="why"),
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_every_event_is_complete(announce, event):
    worker = FakeWorker()
    announce(worker.announcer())
    assert worker.events == [event]
    assert [topic for topic, _ in worker.messages] == [topic_of("r")]


def test_a_heartbeat_is_announced_at_most_once_per_second():
    times, worker = iter((0.0, 0.5, 0.99, 1.0, 1.5, 3.0, 3.5)), FakeWorker()
    announcer = worker.announcer(clock=lambda: next(times))
    due = [announcer.heartbeat() for _ in range(7)]
    assert due == [True, False, False, True, False, True, False]
    assert len(worker.events) == 3


def test_a_long_message_is_cut():
    worker = FakeWorker()
    worker.announcer().fault("score", "x" * 1000)
    worker.announcer().ended("failed", 0, "y" * 1000)
    assert (worker.events[0].detail, worker.events[1].message) == ("x" * 400, "y" * 400)


def test_no_event_holds_the_signature_of_a_url():
    worker = FakeWorker()
    worker.announcer().fault("score", "chunk 3: 403, url='https://me:hunter2@host/data.zip?X-Amz-Signature=hunter2'")
    worker.announcer().ended("failed", 3, f"{'x' * 380} zip::https://host/data.zip?sig=hunter2")
    assert [event.detail if event.kind == "fault" else event.message for event in worker.events] == [
        "chunk 3: 403, url='https://host/data.zip'",
        f"{'x' * 380} zip::https://host/d",
    ]

"""Publish and subscribe on a real cluster: order, backlog, duplicates, bitwise parameters."""

from __future__ import annotations

import gc
import hashlib
import queue

import pytest
import torch
from distributed import Client, get_client, get_worker

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.events import Control, Event, Fault, Heartbeat, Progress, Published, Scored, parse
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.parameters import forget, newest, open_variable, publish

TIMEOUT = 30


def fault(number: int, run: str = "r") -> Fault:
    return Fault(run=run, incarnation=1, what="test", detail=str(number))


def test_events_arrive_in_order_and_once(client: Client):
    subscription = pubsub.subscribe(client, "t-order")
    for number in range(50):
        pubsub.announce(client, "t-order", fault(number))
    received = [subscription.get(TIMEOUT) for _ in range(50)]
    assert [event.detail for event in received] == [str(n) for n in range(50)]
    assert subscription.get(0.05) is None
    subscription.close()


def test_a_late_subscriber_receives_the_backlog_and_nothing_twice(client: Client):
    early = pubsub.subscribe(client, "t-late")
    pubsub.announce(client, "t-late", fault(1))
    assert early.get(TIMEOUT).detail == "1"
    late = pubsub.subscribe(client, "t-late")
    pubsub.announce(client, "t-late", fault(2))
    assert [late.get(TIMEOUT).detail for _ in range(2)] == ["1", "2"]
    assert early.get(TIMEOUT).detail == "2"
    assert late.get(0.05) is early.get(0.05) is None


def test_a_waiting_subscriber_can_be_woken_and_misses_nothing(client: Client):
    woken = pubsub.subscribe(client, "t-woken")
    woken.wake()
    pubsub.announce(client, "t-woken", fault(1))
    assert woken.get(TIMEOUT) is None
    assert woken.get(TIMEOUT).detail == "1"
    woken.wake()
    assert list(woken.drain()) == []
    assert woken.get(0.05) is None
    woken.close()


def test_two_subscribers_of_one_client_do_not_take_each_others_events(client: Client):
    one, two = pubsub.subscribe(client, "t-two"), pubsub.subscribe(client, "t-two")
    one.close()
    pubsub.announce(client, "t-two", fault(3))
    assert two.get(TIMEOUT).detail == "3"
    two.close()


class EchoingClient:
    """A client whose scheduler replies at once and remembers nothing."""

    status = "running"

    def subscribe_topic(self, topic, handler):
        self.handler = handler

    def log_event(self, topic, message):
        self.handler((0.0, message))

    def get_events(self, topic):
        return ()


def test_a_subscriber_that_does_not_look_for_days_holds_the_latest_events_only():
    client = EchoingClient()
    subscription = pubsub.subscribe(client, "t-days")
    for number in range(pubsub.MOST_WAITING + 500):
        client.log_event("t-days", fault(number).record())
    details = [event.detail for event in subscription.drain()]
    assert len(details) == pubsub.MOST_WAITING
    assert details[-1] == str(pubsub.MOST_WAITING + 499)


def test_events_are_not_kept_for_subscribers_that_are_gone():
    client = EchoingClient()
    kept = pubsub.subscribe(client, "t-gone")
    for _ in range(10):
        pubsub.subscribe(client, "t-gone")  # such as a notebook's cell that attaches to a run, again and again
    gc.collect()
    assert len(client.handler.queues) == 1
    client.log_event("t-gone", fault(1).record())
    assert kept.get(0).detail == "1"


def test_an_echo_that_was_lost_is_asked_for_again_soon():
    """The subscription often overtakes the first one; each further wait is twice as long."""

    class LossyClient:
        status, sent = "closed", 0

        def subscribe_topic(self, topic, handler):
            self.handler = handler

        def log_event(self, topic, message):
            self.sent += 1
            if self.sent == 5:
                self.handler((0.0, message))

        def get_events(self, topic):
            return ()

    waits = []

    class Waits(queue.SimpleQueue):
        def get(self, block=True, timeout=None):
            waits.append(timeout)
            return super().get(timeout=0)

    client = LossyClient()
    subscription = pubsub.Subscription(client, "t-lossy")
    subscription._queue = Waits()
    subscription.open()
    assert client.sent == 5
    assert waits == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08], abs=0.004)
    subscription.close()


def _announce_all(topic: str, numbers: range) -> None:
    for number in numbers:
        pubsub.announce(get_worker(), topic, fault(number))


def test_events_of_a_worker_arrive(client: Client):
    subscription = pubsub.subscribe(client, "t-worker")
    client.submit(_announce_all, "t-worker", range(20), pure=False).result(timeout=TIMEOUT)
    assert [subscription.get(TIMEOUT).detail for _ in range(20)] == [str(n) for n in range(20)]


EVENTS: list[Event] = [
    fault(1),
    Published(run="r", incarnation=2, version=32, address="tcp://x:1", checkpoint=None),
    Progress(run="r", incarnation=2, step=20, address="tcp://x:1", open=True, values={"loss": 0.5}),
    Scored(run="r", incarnation=1, chunks=((0, 1, 32), (1, 1, 32)), examples=10, per_second=3.5),
    Control(run="r", incarnation=0, attempt=7, want="pause"),
    Heartbeat(run="r", incarnation=1, role="coordinator", address="tcp://x:1"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: e.kind)
def test_an_event_travels_whole(client: Client, event: Event):
    subscription = pubsub.subscribe(client, f"t-{event.kind}")
    pubsub.announce(client, f"t-{event.kind}", event)
    assert subscription.get(TIMEOUT) == event


@pytest.mark.parametrize("message", [None, 3, {}, {"kind": "other"}, {"kind": "published"}, {"kind": ["x"]}])
def test_what_is_no_event_is_passed_over(message):
    assert parse(message) is None


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(tensors.items()))).hexdigest()


def _publish(variable: str, versions: range) -> dict[int, str]:
    """What the learner does: the tensors change after a copy was published."""
    client, digests = get_client(), {}
    weights = {"a": torch.randn(200_000), "b": torch.randn(3)}
    for version in versions:
        published = {name: t.clone() for name, t in weights.items()}
        digests[version] = _digest(published)
        publish(client, variable, published, run="r", incarnation=1, version=version)
        for tensor in weights.values():
            tensor += 1
    return digests


def test_a_task_gets_bitwise_what_was_published(client: Client):
    open_variable(client, "v-bits")
    assert newest(client, "v-bits", TIMEOUT) is None
    digests = client.submit(_publish, "v-bits", range(5), pure=False, resources={"learner": 1}).result(timeout=TIMEOUT)
    found = newest(client, "v-bits", TIMEOUT)
    assert found is not None
    assert found.order == (1, 4)
    task = client.submit(_digest, found.future, pure=False, resources={"scorer": 1})
    assert task.result(timeout=TIMEOUT) == digests[4]
    forget(client, "v-bits")


def test_a_variable_that_nobody_opened_is_reported_in_time(client: Client):
    with pytest.raises(WaitTimeoutError, match="has the run been started"):
        newest(client, "v-none", 0.2)

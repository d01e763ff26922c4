"""Events of a loop outside the cluster: in order, and nobody waits for a scheduler that does not reply."""

from __future__ import annotations

import threading
import time

from dask_isgd.runtime.client_sender import ClientSender

WAIT = 30


class Silent:
    """A client whose scheduler replies once it is ``released``."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.released = threading.Event()

    def log_event(self, topic: str, msg: object) -> None:
        assert self.released.wait(WAIT)
        if msg == "bad":
            raise OSError("connection lost")
        self.sent.append((topic, msg))


def test_events_are_sent_in_order_and_an_error_costs_one_of_them():
    client = Silent()
    client.released.set()
    sender = ClientSender(client, WAIT).open()
    for message in ("a", "bad", "b"):
        sender.log_event("topic", message)
    sender.close()
    assert client.sent == [("topic", "a"), ("topic", "b")]


def test_a_scheduler_that_does_not_reply_keeps_nobody_waiting():
    client = Silent()
    sender = ClientSender(client, 0.05).open()
    began = time.monotonic()
    for number in range(5000):
        sender.log_event("topic", number)
    sender.close()
    assert time.monotonic() - began < WAIT / 2
    client.released.set()


def test_there_is_a_tick_while_there_is_nothing_to_send():
    ticked = threading.Event()
    sender = ClientSender(Silent(), WAIT, on_tick=ticked.set).open()
    assert ticked.wait(WAIT)
    sender.close()

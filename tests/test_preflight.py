"""Who takes part in a run: the workers that are there when it begins."""

from __future__ import annotations

import pytest
from distributed.comm import CommClosedError

from dask_isgd import preflight

CLOSED = CommClosedError("in <TCP>: Connection reset by peer")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict]]:
    """What the scheduler knows, one look after the other; the last one stays."""
    found: list[dict[str, dict]] = []
    monkeypatch.setattr(preflight, "workers_of", lambda client: found.pop(0) if len(found) > 1 else found[0])
    return found


def test_a_worker_that_dies_while_it_is_asked_is_no_mistake(looks):
    looks += [{"alive": {}, "dead": {}}, {"alive": {}, "dead": {}}, {"alive": {}}]
    assert preflight._of_the_living(None, {"alive": [], "dead": CLOSED}) == {"alive": []}


def test_one_that_does_not_answer_and_stays_is(looks, monkeypatch):
    monkeypatch.setattr(preflight, "_LEAVING", 0.2)
    looks.append({"alive": {}, "mute": {}})
    answers = {"alive": [], "mute": CLOSED}
    assert preflight._of_the_living(None, answers) == answers


def test_a_workers_own_errors_are_its_answer(looks):
    looks.append({})
    answers = {"a": PermissionError(13, "no"), "b": ValueError("no")}
    assert preflight._of_the_living(None, answers) == answers

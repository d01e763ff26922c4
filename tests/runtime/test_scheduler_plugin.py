"""What the guard of a run does at each transition of its tasks, on a scheduler in a few lines."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.protocol.pickle import dumps

from dask_isgd.events import Ended, Fault, parse
from dask_isgd.runtime.scheduler_plugin import _guard_plugin, guard_run

RUN, TOPIC, ATTEMPT = "r", "isgd-r", 3
LEARNER, COORDINATOR = ("learn-r", ATTEMPT), ("coordinate-r", ATTEMPT)


class Group:
    span_id = "default"
    dependencies: frozenset[Any] = frozenset()


class Scheduler:
    """What a plugin uses of a scheduler: delayed calls are made at once."""

    allowed_failures = 3

    def __init__(self, plugin: Any) -> None:
        self.tasks: dict[Any, SimpleNamespace] = {}
        self.workers: dict[str, SimpleNamespace] = {}
        self.loop = SimpleNamespace(call_later=lambda seconds, call, *arguments: call(*arguments))
        self.logged: list[dict[str, Any]] = []
        self.removed: list[str] = []
        self.plugins: dict[str, Any] = {}
        topics = {TOPIC: SimpleNamespace(subscribers=set()), "isgd-other": SimpleNamespace(subscribers=set())}
        self._broker = SimpleNamespace(_topics=topics)
        self.span = SimpleNamespace(_metadata={"collections": []}, groups={Group()})
        self.extensions = {"spans": SimpleNamespace(spans={"default": self.span})}
        self.plugin = plugin
        plugin.scheduler = self

    def log_event(self, topic: str, message: dict[str, Any]) -> None:
        assert topic == TOPIC
        self.logged.append(message)

    def remove_plugin(self, name: str) -> None:
        self.removed.append(name)

    def task(self, key: Any, **changes: Any) -> SimpleNamespace:
        fields = {"suspicious": 0, "processing_on": None, "loose_restrictions": False, "worker_restrictions": None}
        fields |= {"group": Group()}
        self.tasks[key] = SimpleNamespace(**{**fields, **changes})
        return self.tasks[key]

    def assign(self, key: Any, address: str) -> None:
        self.tasks[key].processing_on = SimpleNamespace(address=address)
        self.plugin.transition(key, "waiting", "processing")

    def die(self, key: Any) -> None:
        """The task's worker dies: Dask counts it and releases the task."""
        self.tasks[key].suspicious += 1
        self.tasks[key].processing_on = None
        self.plugin.transition(key, "processing", "released")

    @property
    def events(self) -> list[Any]:
        return [parse(message) for message in self.logged]


@pytest.fixture
def scheduler() -> Scheduler:
    made = Scheduler(_guard_plugin(RUN, TOPIC, ATTEMPT, {"learner": LEARNER, "coordinator": COORDINATOR}))
    made.task(LEARNER)
    made.task(COORDINATOR)
    return made


def progress(scheduler: Scheduler, kind: str = "progress", topic: str = TOPIC) -> None:
    scheduler.plugin.log_event(topic, {"kind": kind})


def test_a_first_assignment_is_no_fault(scheduler):
    scheduler.assign(LEARNER, "a")
    assert scheduler.plugin.addresses == {LEARNER: "a"}
    assert scheduler.events == []


@pytest.mark.parametrize("kind", ["progress", "scored"])
def test_deaths_with_progress_in_between_are_forgotten(scheduler, kind):
    scheduler.assign(LEARNER, "a")
    for death in range(10):
        progress(scheduler, kind)
        scheduler.die(LEARNER)
        scheduler.assign(LEARNER, f"b{death}")
        assert scheduler.tasks[LEARNER].suspicious == 0
    assert [event.what for event in scheduler.events] == ["learner starts again"] * 10
    assert scheduler.events[-1].detail == "on b9"


@pytest.mark.parametrize(("kind", "topic"), [(None, TOPIC), ("heartbeat", TOPIC), ("progress", "isgd-other")])
def test_deaths_without_progress_of_this_run_add_up(scheduler, kind, topic):
    scheduler.assign(LEARNER, "a")
    for _ in range(3):
        if kind is not None:
            progress(scheduler, kind, topic)
        scheduler.die(LEARNER)
        scheduler.assign(LEARNER, "b")
    assert scheduler.tasks[LEARNER].suspicious == 3


def test_one_step_of_progress_pardons_each_task_once(scheduler):
    scheduler.assign(LEARNER, "a")
    scheduler.assign(COORDINATOR, "b")
    progress(scheduler)
    for key in (LEARNER, COORDINATOR):
        scheduler.die(key)
        scheduler.assign(key, "c")
        assert scheduler.tasks[key].suspicious == 0
        scheduler.die(key)
        scheduler.assign(key, "c")
        assert scheduler.tasks[key].suspicious == 1


def test_progress_is_the_moment_to_forget_what_was_submitted(scheduler):
    scheduler.span._metadata["collections"] += range(250)
    progress(scheduler, "progress", "isgd-other")
    assert len(scheduler.span._metadata["collections"]) == 250
    progress(scheduler)
    assert scheduler.span._metadata["collections"] == [*range(150, 250)]


def test_a_task_without_a_worker_is_announced_and_so_is_its_start(scheduler):
    scheduler.plugin.transition(LEARNER, "waiting", "no-worker")
    scheduler.assign(LEARNER, "a")
    scheduler.assign(COORDINATOR, "a")
    assert scheduler.events == [
        Fault(run=RUN, incarnation=0, what="learner waits", detail="no worker can take it"),
        Fault(run=RUN, incarnation=0, what="learner starts again", detail="on a"),
    ]
    assert [message["number"] for message in scheduler.logged] == [1, 2], "subscribers drop repeated numbers"


@pytest.mark.parametrize(
    ("key", "loose", "kept"),
    [
        (LEARNER, True, False),
        (("score-r", 5, 1, 0, "ab"), True, False),
        (LEARNER, False, True),  # it must have this worker
        (("score-other", 5), True, True),
        ("learn-r", True, True),
    ],
    ids=["learner", "score", "strict", "another run", "no key of ours"],
)
def test_a_task_that_only_prefers_workers_takes_any_once_there_is_none(scheduler, key, loose, kept):
    task = scheduler.task(key, loose_restrictions=loose, worker_restrictions={"gone"})
    scheduler.plugin.transition(key, "waiting", "no-worker")
    assert task.worker_restrictions == ({"gone"} if kept else set())


@pytest.mark.parametrize(
    ("suspicious", "start", "text", "message"),
    [
        (4, "processing", "", "its worker died 4 times, without progress in between"),
        (0, "no-worker", "", "no worker could take it within distributed.scheduler.no-workers-timeout"),
        (3, "processing", "ValueError('x')", "ValueError('x')"),
        (0, "processing", "x" * 1000, "x" * 400),
        (0, "processing", "", "see the log of its worker"),
    ],
)
def test_a_failure_is_announced_with_its_reason(scheduler, suspicious, start, text, message):
    scheduler.tasks[LEARNER].suspicious = suspicious
    scheduler.plugin.transition(LEARNER, start, "erred", exception_text=text)
    (event,) = scheduler.events
    assert isinstance(event, Ended)
    assert (event.role, event.outcome, event.attempt, event.message) == ("learner", "failed", ATTEMPT, message)


@pytest.mark.parametrize(("limit", "detail"), [(8e9, "held 9,000 MB of 8,000 MB"), (0, "held 9,000 MB")])
def test_a_worker_killed_for_its_memory_is_announced_for_the_task_it_had(scheduler, limit, detail):
    scheduler.assign(LEARNER, "a")
    scheduler.assign(COORDINATOR, "b")
    scheduler.workers = {"a": SimpleNamespace(memory_limit=limit)}
    scheduler.plugin.log_event("worker-restart-memory", {"worker": "a", "rss": 9e9})
    scheduler.plugin.log_event("worker-restart-memory", {"worker": "c", "rss": 9e9})
    scheduler.plugin.log_event("worker-restart-memory", "not a record")
    (event,) = scheduler.events
    assert (event.what, event.detail) == ("learner killed for memory", f"its worker a {detail}")


def test_scaling_down_spares_the_learners_worker_only(scheduler):
    workers = [SimpleNamespace(address=address) for address in "abc"]
    assert scheduler.plugin.valid_workers_downscaling(scheduler, workers) == workers
    scheduler.assign(LEARNER, "a")
    scheduler.assign(COORDINATOR, "b")
    assert scheduler.plugin.valid_workers_downscaling(scheduler, workers) == workers[1:]
    scheduler.die(LEARNER)
    scheduler.assign(LEARNER, "c")
    assert scheduler.plugin.valid_workers_downscaling(scheduler, workers) == workers[:2]
    rank = ("follow-r", ATTEMPT, 1, 0)
    scheduler.task(rank)
    scheduler.assign(rank, "b")
    assert scheduler.plugin.valid_workers_downscaling(scheduler, workers) == workers[:1]
    scheduler.die(rank)
    assert scheduler.plugin.valid_workers_downscaling(scheduler, workers) == workers[:2]


def test_the_guard_goes_with_the_last_of_its_tasks_and_ignores_all_others(scheduler):
    scheduler.plugin.transition("other", "processing", "erred")
    scheduler.plugin.transition(LEARNER, "released", "forgotten")
    assert scheduler.removed == []
    scheduler.plugin.transition(COORDINATOR, "released", "forgotten")
    assert scheduler.removed == [f"isgd-{RUN}-{ATTEMPT}"]
    assert scheduler.events == []
    assert set(scheduler._broker._topics) == {"isgd-other"}


def test_the_events_of_a_run_that_was_resumed_meanwhile_stay(scheduler):
    scheduler.plugins[f"isgd-{RUN}-{ATTEMPT + 1}"] = object()
    for key in (LEARNER, COORDINATOR):
        scheduler.plugin.transition(key, "released", "forgotten")
    assert TOPIC in scheduler._broker._topics


def test_the_plugin_can_be_loaded_without_this_package(tmp_path):
    path = tmp_path / "plugin"
    path.write_bytes(dumps(_guard_plugin(RUN, TOPIC, ATTEMPT, {"learner": LEARNER})))
    code = f"""
import pathlib, sys
sys.modules["dask_isgd"] = sys.modules["torch"] = None
from distributed.protocol.pickle import loads
plugin = loads(pathlib.Path({str(path)!r}).read_bytes())
from types import SimpleNamespace as Record
task = Record(loose_restrictions=True, worker_restrictions={{1}}, suspicious=1, processing_on=Record(address="a"))
plugin.scheduler = Record(tasks={{("learn-r", {ATTEMPT}): task}}, extensions={{}})
plugin.log_event("isgd-r", {{"kind": "progress"}})
plugin.transition(("learn-r", {ATTEMPT}), "waiting", "processing")
print(plugin.name, task.suspicious)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.stderr) == ([f"isgd-{RUN}-{ATTEMPT}", "0"], "")


def test_a_scheduler_that_accepts_no_plugin_is_a_warning(caplog):
    def refuse(plugin: Any) -> None:
        raise ValueError("pickle is off")

    guard_run(SimpleNamespace(register_plugin=refuse), RUN, TOPIC, ATTEMPT, {"learner": LEARNER})
    assert "run r: the scheduler does not accept a plugin (pickle is off)" in caplog.text

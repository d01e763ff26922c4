"""What a worker logs and a client raises of a task's error: a sentence of ours, and all there is of anybody else's."""

from __future__ import annotations

import logging
import traceback

import pytest
from distributed import Client, LocalCluster

from dask_isgd.errors import ModelError, StorageFullError
from dask_isgd.runtime.task_errors import in_one_sentence, is_ours, log_in_one_line

FULL = "cannot write /a: no space is left"


def full():
    log_in_one_line()
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        raise StorageFullError(FULL) from error


def broken():
    log_in_one_line()
    raise ValueError("of a user")


@pytest.fixture(scope="module")
def client():
    settings = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**settings) as cluster, Client(cluster) as client:
        yield client


def logged(client, caplog, task):
    """Submit a task to a worker of this process; return its error, and what the worker logs."""
    error = client.submit(task, pure=False).exception(timeout=30)
    return error, caplog.text


def test_a_workers_log_has_an_error_of_ours_in_one_line(client, caplog):
    error, text = logged(client, caplog, full)
    assert isinstance(error, StorageFullError)
    assert len(text.splitlines()) == 1
    assert f"failed: StorageFullError('{FULL}')" in text


def test_and_other_errors_with_their_traceback(client, caplog):
    _, text = logged(client, caplog, broken)
    assert "Compute Failed" in text
    assert "Traceback" in text


def test_a_client_sees_no_frames_of_the_worker(client):
    error = client.submit(full, pure=False).exception(timeout=30)
    assert "in full" in "".join(traceback.format_exception(error))
    with pytest.raises(StorageFullError) as caught:
        raise in_one_sentence(error)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1
    assert "in full" not in shown
    assert shown.endswith(f"StorageFullError: {FULL}\n")


def test_the_cause_is_kept_if_it_is_a_users():
    cause = ZeroDivisionError("in a model")
    error = ModelError("the model fails")
    error.__cause__ = cause
    assert in_one_sentence(error).__cause__ is cause
    assert in_one_sentence(cause) is cause


@pytest.mark.parametrize(
    ("name", "ours"), [("StorageFullError", True), ("LabelError", True), ("ValueError", False), ("annotations", False)]
)
def test_whose_error_it_is(name, ours):
    assert is_ours(name) is ours


class TestCanary:
    """A release of distributed that words its messages otherwise fails here."""

    def test_a_task_that_is_cut_short_is_not_logged(self, caplog):
        import inspect

        from distributed import worker, worker_state_machine

        assert 'f"Async instruction for {task} ended with CancelledError"' in inspect.getsource(worker_state_machine)
        assert '"Compute Failed\\n"' in inspect.getsource(worker)
        log_in_one_line()
        log = logging.getLogger("distributed.worker.state_machine")
        log.warning("Async instruction for <Task> ended with CancelledError")
        log.warning("something else")
        assert [record.getMessage() for record in caplog.records] == ["something else"]

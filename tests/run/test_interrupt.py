"""Whether a second Ctrl-C comes in time."""

from __future__ import annotations

import pytest

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.pipelines.commands.terminated import Terminated
from dask_isgd.run.interrupt import next_interrupt


class Watched:
    """A run whose watch ends with an error, or with the run."""

    def __init__(self, error: type[BaseException] | None) -> None:
        self.error = error

    def watch(self, timeout=None):
        assert timeout == 3.0
        yield {}
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "again"),
    [(KeyboardInterrupt, KeyboardInterrupt), (Terminated, Terminated), (WaitTimeoutError, None), (None, None)],
)
def test_only_a_second_interrupt_counts(capsys, error, again):
    found = next_interrupt(Watched(error), 3.0, "press Ctrl-C again")
    assert (None if found is None else type(found)) is again
    assert capsys.readouterr().err == "press Ctrl-C again\n"

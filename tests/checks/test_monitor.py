"""What a run's watcher makes of events."""

from __future__ import annotations

import pytest

from dask_isgd.checks.monitor import _as_raised
from dask_isgd.errors import IsgdError, StorageFullError
from dask_isgd.events import Ended


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        ("StorageFullError: cannot write /a: no space", StorageFullError, "cannot write /a: no space"),
        ("StorageFullError('cannot write /a: no space')", StorageFullError, "cannot write /a: no space"),
        ("StorageFullError('cannot write /a: cut o", StorageFullError, "cannot write /a: cut o"),
        ("ValueError('x')", IsgdError, "the learner failed at step 7: ValueError('x')"),
    ],
)
def test_an_error_that_an_event_tells_of_is_raised_as_its_own_kind(message, kind, said):
    ended = Ended(run="r", incarnation=1, attempt=1, role="learner", outcome="failed", step=7, message=message)
    error = _as_raised("r", ended)
    assert type(error) is kind
    assert said in str(error)

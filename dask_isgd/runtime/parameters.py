"""Published parameters: one scattered future per version, and a Dask ``Variable`` that holds the latest."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future, Variable
from torch import Tensor

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.order import Order


@dataclass(frozen=True)
class Parameters:
    """One published version: a future of a flat dict of tensors on the host."""

    future: Future[Any]
    incarnation: int
    version: int

    @property
    def order(self) -> Order:
        return self.incarnation, self.version


def publish(
    client: Client,
    variable: str,
    tensors: dict[str, Tensor],
    *,
    run: str,
    incarnation: int,
    version: int,
    timeout: float = 30.0,
) -> Parameters:
    """Make a version the newest: scatter it on this worker and put its future into the Variable.

    The tensors are not copied: whoever publishes must not write to them until nobody holds the
    version any more. A plain ``dict`` of float32 tensors goes out of band (an ``OrderedDict`` or
    bfloat16 does not). Keys are never used again: a second scatter under one key leaves two values.
    """
    key = f"params-{run}-{incarnation}-{version}-{uuid.uuid4().hex[:8]}"
    future = client.scatter({key: tensors}, hash=False, timeout=timeout)[key]
    Variable(variable, client=client).set(future, timeout=timeout)
    return Parameters(future, incarnation, version)


def newest(client: Client, variable: str, timeout: float) -> Parameters | None:
    """The newest published version, or None where there is none yet.

    Raises WaitTimeoutError where nobody has opened the Variable.
    """
    try:
        future = Variable(variable, client=client).get(timeout=timeout)
    except TimeoutError as error:
        raise WaitTimeoutError(f"{variable}: not there within {timeout:g} s; has the run been started?") from error
    if not isinstance(future, Future):
        return None
    _, incarnation, version, _ = str(future.key).rsplit("-", 3)
    return Parameters(future, int(incarnation), int(version))


def open_variable(client: Client, variable: str) -> None:
    """Make the Variable, with nothing published; to ask for a missing one is an error in the scheduler's log."""
    Variable(variable, client=client).set(None)


def forget(client: Client, variable: str) -> None:
    """Drop the scheduler's hold on the newest version."""
    Variable(variable, client=client).delete()


def result(future: Future[Any], timeout: float) -> Any:
    """A future's result within ``timeout`` seconds, or WaitTimeoutError naming its key."""
    try:
        return future.result(timeout=timeout)
    except TimeoutError as error:
        raise WaitTimeoutError(
            f"{future.key}: no result within {timeout:g} s (status {future.status}); is a worker there to run it?"
        ) from error

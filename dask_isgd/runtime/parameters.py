"""Published parameters: one scattered future per version, and a Dask ``Variable`` that holds the latest."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future, Variable
from torch import Tensor

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.order import Order
from dask_isgd.runtime.dask_internals import forget_keys


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
    worker: str | None = None,
) -> Parameters:
    """Make a version the latest: scatter it and put its future into the Variable.

    It is scattered on the ``worker`` of that address, or on this one, if this is a worker.

    The tensors are not copied, so the caller must not write to them as long as the version is held
    anywhere. Dask sends a plain ``dict`` of float32 tensors without copying them (unlike an
    ``OrderedDict``). Keys are never reused: a second scatter under one key leaves two values.
    """
    forget_keys()
    key = f"params-{run}-{incarnation}-{version}-{uuid.uuid4().hex[:8]}"
    workers = None if worker is None else [worker]
    future = client.scatter({key: tensors}, workers=workers, hash=False, timeout=timeout)[key]
    Variable(variable, client=client).set(future, timeout=timeout)
    return Parameters(future, incarnation, version)


def newest(client: Client, variable: str, timeout: float) -> Parameters | None:
    """Return the latest published version, or None if there is none yet.

    Raises WaitTimeoutError if the Variable has not been opened.
    """
    try:
        future = Variable(variable, client=client).get(timeout=timeout)
    except TimeoutError as error:
        raise WaitTimeoutError(f"{variable}: no Variable within {timeout:g} s; has the run been started?") from error
    if not isinstance(future, Future):
        return None
    _, incarnation, version, _ = str(future.key).rsplit("-", 3)
    return Parameters(future, int(incarnation), int(version))


def open_variable(client: Client, variable: str) -> None:
    """Create the Variable with nothing published; reading a missing one logs an error on the scheduler."""
    Variable(variable, client=client).set(None)


def forget(client: Client, variable: str) -> None:
    """Delete the Variable, and with it the scheduler's reference to the latest version."""
    Variable(variable, client=client).delete()

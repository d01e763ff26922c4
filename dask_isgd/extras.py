"""Optional packages: each belongs to an extra, and a missing one is one sentence with the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dask_isgd.errors import MissingExtraError


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Convert the error of a package that cannot be imported into MissingExtraError; wrap it around the imports.

    >>> with needs("images", "a folder of images"):
    ...     import no_such_package
    Traceback (most recent call last):
        ...
    dask_isgd.errors.MissingExtraError: a folder of images needs no_such_package, which is not installed: \
pip install 'dask_isgd[images]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which is not installed: pip install 'dask_isgd[{extra}]'"
        ) from error

"""Gradient norms that are NaN, infinite or negative: a few are passed over, many are an error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import NonFiniteNormsError

BAD_SHARE = 0.01
"""Share of a chunk's norms that may be bad; one bad norm is allowed in any chunk."""


def is_bad(norms: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (n,) whether each norm is NaN, infinite or negative. The example keeps its former weight then."""
    return np.asarray(~(np.isfinite(norms) & (norms >= 0)))


def check_norms(norms: NDArray[np.float32], source: str, start: int) -> NDArray[np.bool_]:
    """Return :func:`is_bad` of the norms (n,) of a chunk that begins at example ``start``.

    Raises NonFiniteNormsError, which begins with ``source``, if more than one norm and more than 1 % are bad.
    """
    bad = is_bad(norms)
    count = int(bad.sum())
    if count > max(1, BAD_SHARE * len(norms)):
        raise NonFiniteNormsError(
            f"{source}: got {count} of {len(norms)} gradient norms NaN, infinite or negative (first: example "
            f"{start + int(bad.argmax())}), wanted at most 1 %; look at those examples, or lower the learning rate"
        )
    return bad

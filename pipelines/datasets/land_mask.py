"""Land or sea: 250,000 places, uniform on the sphere. What is left to learn lies along the coasts.

A problem for importance sampling: labels without noise, and a few examples that stay hard. The mask is that of the
package global-land-mask (MIT licence), made from NOAA's GLOBE elevations at 1 km.
"""

from __future__ import annotations

import numpy as np

from dask_isgd.errors import DataError
from dask_isgd.extras import needs
from dask_isgd.pipelines.datasets.sphere import halves, random_places
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.storage.data.prepared import finished
from dask_isgd.storage.tables.arrays import ArrayTable

TRAIN, TEST = 200_000, 50_000
CHUNK = 2048
SEED = 42
IDENTITY = {"pipeline": "land-mask", "version": 1, "seed": SEED}


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train`` and ``test``; return ``url``.

    ``place`` (N, 3) f4 are unit vectors from the Earth's centre, ``label`` (N) i8 is 0 for sea and 1 for land. The mask
    takes 0.9 GB of memory meanwhile. Raises MissingExtraError, DataError.
    """
    if source is not None:
        raise DataError(
            f"land-mask: got the folder {source!r}, wanted none: the mask comes with a package; leave out --from"
        )
    if finished(url, IDENTITY):
        return url
    with needs("datasets", "the dataset land-mask"):
        from global_land_mask import globe
    latitudes, longitudes, places = random_places(TRAIN + TEST, SEED)
    labels = np.asarray(globe.is_land(latitudes, longitudes)).astype(np.int64)
    table = ArrayTable({"place": places, "label": labels}, class_names=["sea", "land"])
    splits = halves(TRAIN, table.length)
    return ingest(table, url, splits=splits, chunk_size=CHUNK, normalise="none", identity=IDENTITY, target="label")

"""The relief of the Earth: the elevation at 250,000 places, uniform on the sphere, from ETOPO at 20 minutes of arc.

A regression in which importance sampling helps little: errors are of similar size everywhere (gain 1.7 after 3,000
steps, land-mask 4.8). NOAA's data; the file is from Debian's package ferret-datasets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.extras import needs
from dask_isgd.pipelines.datasets.sources import Source
from dask_isgd.pipelines.datasets.sphere import halves, random_places
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.storage.data.prepared import finished
from dask_isgd.storage.tables.arrays import ArrayTable

TRAIN, TEST = 200_000, 50_000
CHUNK = 2048
SEED = 42
IDENTITY = {"pipeline": "relief", "version": 1, "seed": SEED}
_UNIT = 1000.0
"""Metres per unit of the target."""

SOURCE = Source(
    name="relief",
    files={"etopo20.cdf": "ba27cb2fa5f2f2b2c76e5a576f0a291fd11ebb3da99ed9b466150c0a064a1db4"},
    variable="ISGD_RELIEF",
    folders=("/usr/share/ferret-vis/data",),
    advice="on Debian `apt install ferret-datasets`",
)


def prepare(url: str, *, source: str | None = None) -> str:
    """Write groups ``train`` and ``test``; return ``url``.

    ``place`` (N, 3) f4 are unit vectors from the Earth's centre, ``elevation`` (N) f4 is in kilometres. ``etopo20.cdf``
    comes from the folder ``source``, from that in $ISGD_RELIEF, or from Debian's package. Raises DataError.
    """
    if finished(url, IDENTITY):
        return url
    relief = _read(SOURCE.find(source)["etopo20.cdf"])
    latitudes, longitudes, places = random_places(TRAIN + TEST, SEED)
    table = ArrayTable({"place": places, "elevation": _at(relief, latitudes, longitudes)})
    splits = halves(TRAIN, table.length)
    return ingest(table, url, splits=splits, chunk_size=CHUNK, normalise="none", identity=IDENTITY, target="elevation")


def _read(path: Path) -> NDArray[np.float32]:
    """Return the elevation (540, 1080) in metres, from the south pole and from 20.17° East."""
    with needs("datasets", "the dataset relief"):
        from scipy.io import netcdf_file
    try:
        with netcdf_file(path, mmap=False) as file:
            relief: NDArray[np.float32] = np.array(file.variables["ROSE"].data, dtype=np.float32)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"relief: {path} cannot be read as ETOPO20 with its variable ROSE ({error})") from error
    if relief.shape != (540, 1081):
        raise DataError(f"relief: got ROSE of shape {relief.shape} in {path}, wanted (540, 1081)")
    return relief[:, :-1]  # the last column repeats the first


def _at(
    relief: NDArray[np.float32], latitudes: NDArray[np.float64], longitudes: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return the elevation (N) in units of the target, linear between the middles of cells."""
    rows, columns = relief.shape
    y = np.clip((latitudes + 90.0) * rows / 180.0 - 0.5, 0.0, rows - 1.0)
    x = ((longitudes - 20.0) * columns / 360.0 - 0.5) % columns
    south, west = np.minimum(y.astype(int), rows - 2), x.astype(int)
    dy, dx, east = y - south, x - west, (west + 1) % columns
    lower = relief[south, west] * (1 - dx) + relief[south, east] * dx
    upper = relief[south + 1, west] * (1 - dx) + relief[south + 1, east] * dx
    return np.asarray((lower * (1 - dy) + upper * dy) / _UNIT, dtype=np.float32)

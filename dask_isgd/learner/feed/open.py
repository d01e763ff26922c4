"""Choose the source of the learner's rows."""

from __future__ import annotations

import logging
import shutil
import tempfile

from dask.utils import format_bytes

from dask_isgd.config import Learning
from dask_isgd.core.batch import Prepare
from dask_isgd.errors import StorageFullError
from dask_isgd.learner.feed.chunk_files import ChunkFiles
from dask_isgd.learner.feed.in_memory import InMemory
from dask_isgd.learner.feed.local_copy import LocalCopy
from dask_isgd.learner.feed.lookahead import Lookahead
from dask_isgd.learner.feed.prefetch import Feed
from dask_isgd.learner.feed.source import DrawSource, Source
from dask_isgd.storage import Dataset

logger = logging.getLogger(__name__)

PREPARED = 2
"""Minibatches prepared ahead of the loop."""
_SLOW = 10
"""Rows decoded per row drawn above which a warning is logged."""
_FREE_FRACTION = 0.8
"""Largest fraction of the free disk space that a copy may take."""


def open_feed(
    dataset: Dataset,
    draws: DrawSource,
    prepare: Prepare,
    learning: Learning,
    *,
    folder: str | None = None,
    timeout: float,
    skip_incomplete: bool = False,
) -> Feed:
    """Open the fastest feed of minibatches of ``dataset`` on the learner's device; ``folder`` may hold a copy.

    They are prepared ahead, unless all rows are in memory and need no copy to a device, or the run is
    synchronous: its draws depend on the norms of the previous step. ``skip_incomplete``: rows with missing values
    contribute nothing.
    """
    source = open_source(dataset, draws, learning, folder=folder, timeout=timeout)
    at_hand = source.in_memory and prepare.device.type == "cpu"
    ahead = 0 if at_hand or learning.synchronous else PREPARED
    return Feed(source, prepare, ahead=ahead, timeout=timeout, skip_incomplete=skip_incomplete)


def open_source(
    dataset: Dataset, draws: DrawSource, learning: Learning, *, folder: str | None = None, timeout: float
) -> Source:
    """Open the fastest source within ``learning.cache_memory`` and ``cache_disk``; its ``reason`` explains the choice.

    In this order: all of it in memory; rows of local uncompressed chunks; a local uncompressed copy in
    ``folder`` (default: the system's temporary one); the store itself, with minibatches drawn ahead. A
    synchronous run draws none ahead, because its draws depend on the norms of the previous step.
    """
    memory, disk = learning.cache_memory_bytes, learning.cache_disk_bytes
    size = format_bytes(dataset.nbytes)
    if dataset.nbytes <= memory:
        return InMemory(dataset, draws, f"in memory: {size} of data, {format_bytes(memory)} allowed")
    reason = f"{size} of data exceed the {format_bytes(memory)} of memory allowed"
    raw = dataset.raw
    if raw is not None:
        return ChunkFiles(dataset, raw, draws, f"rows of local uncompressed chunks: {reason}", memory=memory)
    kind = "compressed" if dataset.local else "remote"
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    room = f"{format_bytes(disk)} of disk allowed, {format_bytes(free)} free"
    if dataset.nbytes <= min(disk, _FREE_FRACTION * free):
        try:
            chosen = f"local uncompressed copy of {kind} data: {reason}; {room}"
            return LocalCopy(dataset, draws, chosen, folder=folder, memory=memory)
        except StorageFullError as error:
            room = str(error)
    reason = f"{reason}, and the disk cannot hold a copy ({room})"
    source = Lookahead(
        dataset,
        draws,
        batch=learning.batch_size,
        steps=1 if learning.synchronous else learning.lookahead_steps,
        prepared=PREPARED,
        memory=memory,
        timeout=timeout,
    )
    source.reason = f"{source.reason}, from the {kind} store: {reason}"
    if source.rows_per_draw > _SLOW:
        source.reason += ". This is slow: allow more memory or disk, or use smaller chunks"
        source.reason += "" if learning.synchronous else "; with enough memory raise lookahead_steps"
        logger.warning("feed: %s", source.reason)
    return source

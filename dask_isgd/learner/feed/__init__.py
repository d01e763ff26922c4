"""From drawn indices to minibatches on the learner's device, as fast as the storage of the data allows."""

from dask_isgd.learner.feed.open import open_feed, open_source
from dask_isgd.learner.feed.prefetch import Feed, Minibatch
from dask_isgd.learner.feed.source import DrawSource, Source

__all__ = ["DrawSource", "Feed", "Minibatch", "Source", "open_feed", "open_source"]

"""From drawn indices to minibatches on the learner's device, as fast as the data's place allows."""

from dask_isgd.feed.choice import open_feed, open_source
from dask_isgd.feed.prefetch import Feed, Minibatch
from dask_isgd.feed.source import Draws, Run, Source

__all__ = ["Draws", "Feed", "Minibatch", "Run", "Source", "open_feed", "open_source"]

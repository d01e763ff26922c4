"""The proposal: which examples a minibatch is drawn from, and with which coefficients. numpy only."""

from dask_isgd.sampling.draws import Draw
from dask_isgd.sampling.gate import Gate
from dask_isgd.sampling.sampler import ChunkSums, ImportanceSampler
from dask_isgd.sampling.schedule import next_chunks

__all__ = ["ChunkSums", "Draw", "Gate", "ImportanceSampler", "next_chunks"]

"""Which examples a minibatch is drawn from, and with which coefficients. numpy only."""

from dask_isgd.sampling.draws import Draw
from dask_isgd.sampling.gain_samples import GainSamples, Sample
from dask_isgd.sampling.gate import Gate
from dask_isgd.sampling.sampler import ImportanceSampler
from dask_isgd.sampling.schedule import next_chunks

__all__ = [
    "Draw",
    "GainSamples",
    "Gate",
    "ImportanceSampler",
    "Sample",
    "next_chunks",
]

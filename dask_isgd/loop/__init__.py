"""Importance sampling for a training loop that is not ours.

::

    batch_sampler   ImportanceBatchSampler: minibatches of indices with coefficients, for a DataLoader
    drawn_ahead     which minibatches were handed out and are not consumed yet
    shares          one global minibatch, shared by the processes of torch.distributed
    weighted        Weighted and weighted_collate: what carries coefficients through a DataLoader
    loss            weighted_mean: the loss of a minibatch
    scorers         Scorers: a coordinator and scoring tasks on a cluster, for a loop outside it
    cluster_link    the loop's side of such a run: versions, weights, history
    scored_batch_sampler, chunk_gain   its batch sampler, and how fresh scores show the gain
    one_pass        score and predict: one pass of a trained model over a dataset, on a cluster
    lightning       ImportanceSampling, a callback (extra ``lightning``)
    huggingface     ImportanceSampling, a mix-in for Trainer (extra ``transformers``)
"""

from dask_isgd.loop.batch_sampler import ImportanceBatchSampler
from dask_isgd.loop.loss import weighted_mean
from dask_isgd.loop.weighted import Weighted, WeightedIndex, weighted_collate

__all__ = ["ImportanceBatchSampler", "Weighted", "WeightedIndex", "weighted_collate", "weighted_mean"]

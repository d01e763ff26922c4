"""Every error the library raises on purpose.

Each message states what was got, what was wanted and what to do::

    IsgdError
    ├── ConfigError (ValueError)        a setting is wrong; all mistakes at once
    ├── DataError (ValueError)
    │   ├── EmptyDatasetError           no examples, or a split is missing
    │   ├── LengthMismatchError         arrays of different lengths
    │   ├── LabelError                  a label that is not a class
    │   ├── MissingChunkError           a chunk was never written
    │   └── CorruptChunkError           a chunk cannot be decoded
    ├── ModelError (ValueError)         the model or the loss has the wrong shape
    ├── NonFiniteLossError              the loss or its gradient is not finite
    ├── NonFiniteNormsError             too many norms are NaN, infinite or negative
    ├── ClusterMismatchError            a worker lacks the data, the model or a package version
    ├── NoLearnerWorkerError            no worker can run the learner
    ├── WorkersLostError                a task keeps losing its workers
    ├── RunExistsError                  the run directory already holds a run
    ├── RunNotFoundError                the run directory holds no run
    ├── RunMismatchError                resumed with other data or another model, or another format
    ├── LeaseLostError                  a newer learner holds the run
    ├── CheckpointError                 a checkpoint cannot be written or verified
    ├── StorageFullError                no room, or not writable
    ├── MissingExtraError (ImportError) an optional package is not installed
    └── WaitTimeoutError (TimeoutError) something did not happen in time

Errors travel between processes, so each takes one message and can be pickled.
"""

from __future__ import annotations


class IsgdError(Exception):
    """The base class of every error that the library raises on purpose."""


class ConfigError(IsgdError, ValueError):
    """One or more settings are wrong; the message lists them all."""


class DataError(IsgdError, ValueError):
    """The dataset cannot be trained on."""

    rows: tuple[int, int] | None = None
    """The examples [start, stop) that cannot be read, if they are known."""


class EmptyDatasetError(DataError):
    """The dataset has no examples, or a requested group is missing."""


class LengthMismatchError(DataError):
    """Arrays that share the sample dimension have different lengths."""


class LabelError(DataError):
    """A target is not a valid class index."""


class MissingChunkError(DataError):
    """A chunk that should exist was never written."""


class CorruptChunkError(DataError):
    """A chunk exists and cannot be decoded or fails its checksum."""


class ModelError(IsgdError, ValueError):
    """The model or the loss returns something of the wrong kind or shape."""


class NonFiniteLossError(IsgdError):
    """The training loss, or its gradient, became NaN or infinite."""

    indices: tuple[int, ...] = ()
    """The first examples whose loss is not finite, if they are known."""


class NonFiniteNormsError(IsgdError):
    """More than one norm in a hundred is NaN, infinite or negative."""


class ClusterMismatchError(IsgdError):
    """A worker cannot read the data, the run directory or the model, or has other package versions."""


class NoLearnerWorkerError(IsgdError):
    """No worker of the cluster can run the learner."""


class WorkersLostError(IsgdError):
    """A task of the run keeps losing its workers and makes no progress."""


class RunExistsError(IsgdError):
    """The run directory already holds a run."""


class RunNotFoundError(IsgdError):
    """The run directory holds no run."""


class RunMismatchError(IsgdError):
    """A run was resumed with other data or another model, or has another format version."""


class LeaseLostError(IsgdError):
    """A newer incarnation of the learner holds the run; this one must stop."""


class CheckpointError(IsgdError):
    """A checkpoint cannot be committed, or no checkpoint verifies."""


class StorageFullError(IsgdError):
    """The run directory cannot be written: full, read-only or over quota."""


class MissingExtraError(IsgdError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class WaitTimeoutError(IsgdError, TimeoutError):
    """Something that was waited for did not happen in time."""

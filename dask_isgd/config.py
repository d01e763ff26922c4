"""What a user can set: three frozen dataclasses that are validated when they are made.

Defaults come from Dask's configuration under ``isgd:`` (see ``isgd.yaml``), so that a site
or an environment variable (``DASK_ISGD__LEARNING__BATCH_SIZE=256``) can change them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import dask.config
from dask.utils import parse_bytes, parse_timedelta
from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from dask_isgd.field_types import (
    Bytes,
    BytesOrZero,
    Count,
    Flag,
    Function,
    Natural,
    Positive,
    Resources,
    Schedule,
    Seconds,
    Text,
    Texts,
)
from dask_isgd.validation import settings
from dask_isgd.yaml_file import read_yaml

OF_DEFAULT_OPTIMIZER = ("learning_rate", "momentum")
"""Settings of ``Learning`` whose defaults are those of its default optimizer."""
SMOOTHING = 0.7
"""Where nothing is known of the learning rate."""
DEFAULTS = read_yaml(Path(__file__).with_name("isgd.yaml"), "the defaults")
dask.config.update_defaults(DEFAULTS)


def default(key: str) -> Any:
    """Return a dataclass field whose default is read from Dask's configuration when an object is made."""
    return dataclasses.field(default_factory=lambda: dask.config.get(f"isgd.{key}"))


def seconds(key: str) -> float:
    """Return a duration of the configuration, in seconds."""
    return float(parse_timedelta(dask.config.get(f"isgd.{key}"), default="s"))


@settings
class Learning:
    """How the learner trains.

    ``optimizer`` is called with the parameters and returns a ``torch.optim.Optimizer``; None
    means SGD with ``learning_rate`` and Nesterov ``momentum``. If these two are given beside an optimizer, it is called
    with them too, as ``lr`` and ``momentum``. ``scheduler`` is called with the
    optimizer and returns a learning-rate scheduler, which is stepped once per update; ``"cosine"``: the rate falls to 0
    along half a cosine over all ``steps``. Instead of a callable its name may be given, ``"package.module:name"``.
    """

    steps: Count
    """Optimizer updates in the run."""
    batch_size: Count = default("learning.batch-size")
    """Examples per step, of all learners together."""
    learning_rate: Positive | None = default("learning.learning-rate")
    """None, the default beside an ``optimizer``: the optimizer's own."""
    momentum: Annotated[float, Field(strict=True, ge=0, le=1)] | None = default("learning.momentum")
    """None, the default beside an ``optimizer``: the optimizer's own."""
    optimizer: Function | None = None
    scheduler: Schedule | None = None
    learning_rate_gain: Flag = default("learning.learning-rate-gain")
    """Multiply the rate by what the draws' lower variance allows: a factor from 1 to the measured gain, near 1 while
    the mean gradient dominates the noise (``Variance.rate_gain``; AdaScale's form). For a rate that was tuned with
    uniform draws; one that was tuned with these draws has no such room."""
    device: Text = default("learning.device")
    """``"auto"`` (the first available of cuda, mps and cpu) or a torch device."""
    learners: Count | Literal["all"] = default("learning.learners")
    """Workers that share each minibatch, which have the resource ``learner``: each takes its part of the ``batch_size``
    examples, and the gradient is the sum. ``"all"``: as many as there are, at most one per example."""
    min_learners: Count = default("learning.min-learners")
    """With how many learners the run continues if others were lost; at its start there have to be all ``learners``."""
    sync_every: Count = default("learning.sync-every")
    """Steps that each of several learners takes by itself, with its own part of each minibatch, before parameters are
    averaged; 1: gradients are summed in every step. For slow links."""
    outer_momentum: Annotated[float, Field(strict=True, ge=0, lt=1)] = default("learning.outer-momentum")
    """Nesterov momentum of the averages' changes; DiLoCo has 0.9, with ``outer_rate`` 0.7. 0: none."""
    outer_rate: Positive = default("learning.outer-rate")
    """Factor of the averages' changes."""
    threads: Count | None = default("learning.threads")
    """torch threads; None: as many as the learner's worker has."""
    publish_every: Count = default("learning.publish-every")
    """Steps between publications; in synchronous mode, the steps of a round. Versions that are neither scored nor
    evaluated are published once a second at most."""
    publish_dtype: Literal["float32", "bfloat16", "float16"] | None = default("learning.publish-dtype")
    """``"float32"``, ``"bfloat16"`` or ``"float16"``: what scorers receive; None: each parameter's own dtype."""
    report_every: Count = default("learning.report-every")
    """Steps between rows of the history."""
    evaluate_every: Count = default("learning.evaluate-every")
    """Steps between evaluations; rounded up to a publication."""
    checkpoint_seconds: Positive = default("learning.checkpoint-seconds")
    checkpoint_steps: Count | None = default("learning.checkpoint-steps")
    """A checkpoint is committed after ``checkpoint_seconds`` or ``checkpoint_steps``, whichever comes first, and
    after the last step."""
    clip_norm: Positive | None = default("learning.clip-norm")
    """Clip every gradient to this norm, as ``torch.nn.utils.clip_grad_norm_`` does; None: never."""
    clip_mean_factor: Positive | None = default("learning.clip-mean-factor")
    """Clip a weighted gradient to this multiple of the running mean of its norm; None: never. It is divided by no more
    than the fourth power of its minibatch's largest coefficient, so uniform draws are never clipped by this. If both
    bounds are set, the smaller one applies."""
    cache_memory: Bytes = default("learning.cache-memory")
    """Bytes of training data that the learner may hold, or a string such as ``"2GB"``."""
    cache_disk: BytesOrZero = default("learning.cache-disk")
    """Bytes of the learner's local disk for an uncompressed copy of compressed or remote data; 0: no copy."""
    lookahead_steps: Count = default("learning.lookahead-steps")
    """Minibatches that are drawn ahead at most if the data fit neither memory nor disk. A drawn minibatch is as many
    steps older than its weights; a chunk is read about once per so many steps, so more of them are faster."""
    transform: Function | None = None
    """Applied to the inputs of each minibatch on the learner's device. Scorers don't apply it: they score examples as
    stored, which affects what is drawn and leaves the gradient unbiased."""
    synchronous: Flag = False
    """Score everything, then take ``publish_every`` steps, and repeat: reproducible to the bit; waits for scorers."""
    seed: Natural = default("learning.seed")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_optimizer(cls, values: Any) -> Any:
        """Let settings of the default optimizer have their defaults beside no other one."""
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, Mapping):
            return values
        own = {name: given[name] for name in OF_DEFAULT_OPTIMIZER if given.get(name) is not None}
        if given.get("optimizer") is not None:
            own = dict.fromkeys(OF_DEFAULT_OPTIMIZER) | own
        rest = {name: value for name, value in given.items() if name not in OF_DEFAULT_OPTIMIZER}
        return ArgsKwargs(values.args, rest | own) if isinstance(values, ArgsKwargs) else rest | own

    @property
    def cache_memory_bytes(self) -> int:
        return int(parse_bytes(self.cache_memory))

    @property
    def cache_disk_bytes(self) -> int:
        return int(parse_bytes(self.cache_disk))


@settings
class Scoring:
    """How the norms are kept fresh."""

    passes: Literal["auto", 0] = default("scoring.passes")
    """``"auto"``: score as long as it pays, on the workers beside the learner's, and where a run has several learners,
    on those that would do less for it by learning; 0: never. Without scores the weights come from the learner's own
    minibatches, as on a cluster of one worker."""
    method: Literal["exact", "bound", "loss"] = default("scoring.method")
    """``"exact"`` gradient norms, ``"bound"`` (last pre-activation) or ``"loss"``."""
    batch_size: Count = default("scoring.batch-size")
    """Examples scored at once."""
    chunk_size: Count | None = default("scoring.chunk-size")
    """Examples per scoring task, a multiple of the dataset's chunk; None: what takes about a second."""
    in_flight: Count = default("scoring.in-flight")
    """Scoring tasks submitted ahead, per thread of a scorer."""
    threads: Count = default("scoring.threads")
    """torch threads per scoring task."""
    resources: Resources | None = None
    """Worker resources per chunk that is scored; None: ``scorer``, if workers declare it. Each task asks for a quarter
    of them: while one is scored, the next one is read and the last one written."""
    timeout: Seconds = default("scoring.timeout")
    """Seconds, or a string such as ``"10 minutes"``, after which a task is submitted again."""
    cache_memory: BytesOrZero = default("scoring.cache-memory")
    """Bytes of decoded data that a scorer's worker keeps between passes, or a string such as ``"1GB"``; 0: none."""
    ignore: Texts = ()
    """Names of parameters, with wildcards (``"*.bias"``), that exact scores omit: a few parameters that no rule serves
    can make scoring many times slower. Norms of the learner's own minibatches are always of all parameters."""
    train_mode: Flag = False
    """Score with dropout on; the gradient stays unbiased either way."""
    skip_bad_chunks: Flag = False
    """Continue without rows that hold NaN or infinity, which contribute nothing, and without a scoring chunk that
    overlaps a missing or corrupt chunk of the data, which is neither scored nor drawn. What
    ``fit`` checks must still be intact: the targets, and the first, the middle and the last chunk."""

    @property
    def cache_memory_bytes(self) -> int:
        return int(parse_bytes(self.cache_memory))

    @property
    def timeout_seconds(self) -> float:
        return float(parse_timedelta(self.timeout, default="s"))


@settings
class Sampling:
    """The proposal that minibatches are drawn from.

    ``smoothing``, ``max_coefficient`` and ``ess_fraction`` each ask for a constant added
    to every weight; the largest of the three is added.
    """

    scheme: Literal["stratified", "independent", "systematic"] = default("sampling.scheme")
    smoothing: Annotated[float, Field(strict=True, ge=0)] | None = default("sampling.smoothing")
    """Constant added to every weight, in units of the mean weight. None: 0.3 for a rate that falls along a cosine, as
    variance decides where that ends, otherwise 0.7."""
    max_coefficient: Annotated[float, Field(strict=True, gt=1)] | None = default("sampling.max-coefficient")
    """Bound on every coefficient 1/(N q), above 1."""
    ess_fraction: Annotated[float, Field(strict=True, gt=0, le=1)] | None = default("sampling.ess-fraction")
    """Lower bound on the effective sample size (Σq)²/Σq², as a fraction of N in (0, 1]."""
    half_life_steps: Positive | None = default("sampling.half-life-steps")
    """Steps of age, that of its scores or of newer feedback, after which a weight has faded halfway to the mean; None:
    never."""
    max_age_steps: Count | None = default("sampling.max-age-steps")
    """Steps of age after which a chunk is not drawn: the paper's policy, **biased**."""
    exponent: Annotated[float, Field(strict=True, gt=0, le=4)] = default("sampling.exponent")
    """Exponent of the weights."""
    ema_decay: Annotated[float, Field(strict=True, ge=0, le=0.999)] = default("sampling.ema-decay")
    """Largest share in [0, 1) of a weight's previous square that a fresh norm keeps: weights that fluctuate less."""
    ema_steps: Positive | None = default("sampling.ema-steps")
    """A previous square that is t steps old keeps a share of exp(-t/ema_steps) at most. None: 1,000 for a rate that
    falls along a cosine, otherwise its age doesn't matter."""
    presample: Count = default("sampling.presample")
    """While the gate is open, draw so many minibatches for each step, and train on one that is chosen from their
    examples by bounds of the gradients, from a forward pass at the current parameters. Reported steps are drawn as
    without, so the reported gain is that of the draws alone. It pays only where a forward pass costs far less than a
    step: in simulated runs with 3, as many updates ended at 0.91 of the training loss, half as many at 1.22 of it
    (``benchmarks/devices.py``). 1: don't."""
    gate: Literal["auto", "open"] = default("sampling.gate")
    """``"auto"``: uniform until importance sampling pays; ``"open"``: always importance sampling."""
    gate_gain: Annotated[float, Field(strict=True, ge=1)] = default("sampling.gate-gain")
    """Gain (second moment under uniform draws over that under the proposal) above which the gate opens."""
    feedback: Flag = default("sampling.feedback")
    """Update the weights of the examples drawn with the norms of the learner's own minibatches."""
    uniform: Flag = False
    """Uniform draws and no scoring: the baseline."""

    @property
    def largest_coefficient(self) -> float:
        """The bound on coefficients that ``smoothing`` and ``max_coefficient`` give; infinite without both."""
        of_smoothing = (1.0 + self.smoothing) / self.smoothing if self.smoothing else math.inf
        return min(of_smoothing, self.max_coefficient or math.inf)

    def suited_to(self, learning: Learning) -> Sampling:
        """Return these settings with what suits the learning rate, where nothing is set."""
        falls = learning.scheduler == "cosine"
        smoothing, steps = (0.3, 1000.0) if falls else (SMOOTHING, None)
        return dataclasses.replace(
            self,
            smoothing=smoothing if self.smoothing is None else self.smoothing,
            ema_steps=steps if self.ema_steps is None else self.ema_steps,
        )


def to_mapping(settings: Learning | Scoring | Sampling) -> dict[str, Any]:
    """Return settings as plain JSON, as ``run.json`` keeps them; a callable becomes its name."""

    def plain(value: Any) -> Any:
        if callable(value):
            return getattr(value, "__qualname__", repr(type(value).__name__))
        if isinstance(value, tuple):
            return list(value)
        return dict(value) if isinstance(value, Mapping) else value

    return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}

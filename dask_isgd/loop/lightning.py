"""Importance sampling for Lightning: a callback that feeds back the norms of Lightning's own backward pass.

::

    importance = isgd.lightning.ImportanceSampling()

    class Model(L.LightningModule):
        def training_step(self, batch, batch_idx):
            index, coefficient, (x, y) = batch
            losses = F.cross_entropy(self(x), y, reduction="none")
            return isgd.weighted_mean(losses, coefficient)

        def train_dataloader(self):
            return importance.loader(dataset, batch_size=64, num_workers=4)

    L.Trainer(callbacks=[importance], use_distributed_sampler=False).fit(Model())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dask_isgd.config import Sampling
from dask_isgd.errors import ConfigError
from dask_isgd.loop.batch_sampler import ImportanceBatchSampler
from dask_isgd.loop.weighted import Weighted, weighted_collate
from dask_isgd.norms import TrainingNorms, capture_norms


class ImportanceSampling(Callback):
    """Makes the training of a ``LightningModule`` importance-sampled, with automatic optimization.

    ``loader`` makes the DataLoader; minibatches are ``(index, coefficient, batch)``, and the module's loss is
    ``weighted_mean``. ``module``: the part of the LightningModule that is called, if it is not called itself; it is
    called once per minibatch. It has to be named if several processes train: Lightning then calls the LightningModule
    itself around its ``training_step``. Gain and gate are logged as ``isgd/...`` at every report. The state is part of
    Lightning's checkpoints.

    Raises ConfigError at the start of training if Lightning replaced the sampler.
    """

    def __init__(
        self,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        module: Callable[[Any], nn.Module] | None = None,
    ) -> None:
        self._sampling, self._seed, self._module = sampling, seed, module
        self.sampler: ImportanceBatchSampler | None = None
        """The sampler of the DataLoader that was made last."""
        self._state: Mapping[str, Any] | None = None
        self._captured: TrainingNorms | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._open = ExitStack()

    def loader(self, dataset: Dataset[Any], batch_size: int, **settings: Any) -> DataLoader[Any]:
        """Return a DataLoader with ``settings`` of its own; ``batch_size`` is that of one process.

        With several processes, call it in ``train_dataloader``: by then they have met.
        """
        if "collate_fn" in settings:
            settings["collate_fn"] = weighted_collate(settings["collate_fn"])
        weighted = Weighted(dataset)
        self.sampler = ImportanceBatchSampler(len(weighted), batch_size, sampling=self._sampling, seed=self._seed)
        if self._state is not None:
            self.sampler.load_state_dict(self._state)
            self._state = None
        return DataLoader(weighted, batch_sampler=self.sampler, **settings)

    # Lightning's hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        used = getattr(trainer.train_dataloader, "batch_sampler", None)
        if self.sampler is None or used is not self.sampler:
            raise ConfigError(
                f"ImportanceSampling: Lightning trains with {type(used).__name__}, wanted the sampler of this "
                "callback's loader; return callback.loader(...) from train_dataloader, and pass "
                "Trainer(use_distributed_sampler=False)"
            )
        sampler: ImportanceBatchSampler = used
        if sampler.processes != trainer.world_size:
            raise ConfigError(
                f"ImportanceSampling: {trainer.world_size} processes train, and the loader was made for "
                f"{sampler.processes}; call callback.loader(...) in train_dataloader, by when they have met"
            )
        if self._module is None and trainer.world_size > 1:
            raise ConfigError(
                f"ImportanceSampling: {trainer.world_size} processes train, and module is not given; pass the part of "
                "the LightningModule that training_step calls, such as module=lambda model: model.net"
            )
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "ImportanceSampling: got manual optimization, wanted automatic; use an ImportanceBatchSampler yourself"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._drawn = batch[0], batch[1]
        self._captured = self._open.enter_context(
            capture_norms(pl_module if self._module is None else self._module(pl_module))
        )

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._captured is None or self._drawn is None or self.sampler is None:
            return
        index, coefficient = self._drawn
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        scale = coefficient.float() * (factor / (len(index) * trainer.accumulate_grad_batches))
        norms = self._captured.norms(scale=scale)
        self._open.close()
        self._captured = self._drawn = None
        self.sampler.update(index, norms)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._open.close()
        if self._drawn is not None and self.sampler is not None:  # training_step returned None
            self.sampler.update(self._drawn[0])
        self._captured = self._drawn = None
        if self.sampler is not None and (trainer.global_step % trainer.log_every_n_steps) == 0:
            report = self.sampler.report()
            names = ("gain", "candidate_gain", "gate", "ess_fraction")
            pl_module.log_dict({f"isgd/{name}": report[name] for name in names}, batch_size=len(batch[0]))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.sampler is None else self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if self.sampler is None:
            self._state = state_dict
        else:
            self.sampler.load_state_dict(state_dict)

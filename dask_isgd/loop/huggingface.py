"""Importance sampling for the Hugging Face ``Trainer``: a mix-in.

::

    class MyTrainer(isgd.huggingface.ImportanceSampling, transformers.Trainer):
        sampling = isgd.Sampling()
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate

from dask_isgd.config import Sampling
from dask_isgd.errors import ConfigError
from dask_isgd.loop.batch_sampler import ImportanceBatchSampler
from dask_isgd.loop.loss import weighted_mean
from dask_isgd.loop.weighted import Weighted, WeightedIndex
from dask_isgd.norms import capture_norms

INDEX, COEFFICIENT = "isgd_index", "isgd_coefficient"
_STATE = "isgd_sampler.pt"


class ImportanceSampling:
    """A mix-in before ``transformers.Trainer`` that makes its training importance-sampled.

    The loss is the weighted mean of ``example_losses``: the cross entropy of ``logits`` (B, classes) with ``labels``
    (B,), unless you override it. Its mean is over examples, also with accumulated gradients: Trainer's mean over the
    tokens of a minibatch (``num_items_in_batch``) would be another loss for each minibatch drawn, and is not used.

    The minibatches are shared among processes by the sampler itself, so Accelerate does not prepare the DataLoader, and
    does not shard it a second time. The sampler's state lies beside Trainer's checkpoints.

    Raises ConfigError for what would be silently wrong: several GPUs in one process, label smoothing, a
    ``compute_loss_func``, another sampling strategy of Trainer, token labels without ``example_losses`` of your own.
    """

    sampling: ClassVar[Sampling | None] = None
    """Settings of the proposal; None: the defaults."""
    sampler: ImportanceBatchSampler | None = None
    """The sampler in use, once training has begun."""

    def example_losses(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Return one loss per example, (B,), of a model's ``outputs`` for ``inputs``, which hold the labels."""
        logits, labels = outputs["logits"], inputs["labels"]
        if labels.ndim != 1 or logits.ndim != 2 or labels.is_floating_point():
            raise ConfigError(
                f"ImportanceSampling: got logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)}"
                ", wanted (B, classes) and integers (B,); override example_losses, which returns one loss per example"
            )
        return nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    _passes: _Passes

    # What Trainer calls

    def _get_train_sampler(self, train_dataset: Any = None) -> ImportanceBatchSampler:
        trainer: Any = self
        args = trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        return ImportanceBatchSampler(len(dataset), trainer._train_batch_size, sampling=self.sampling, seed=seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self
        args = trainer.args
        refused = {
            "several GPUs in one process": args.n_gpu > 1,
            "label_smoothing_factor": args.label_smoothing_factor != 0,
            "compute_loss_func": trainer.compute_loss_func is not None,
            "group_by_length": getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential"),
        }
        for name in (name for name, wrong in refused.items() if wrong):
            raise ConfigError(f"ImportanceSampling: got {name}, wanted training without it: its losses would be wrong")
        collator = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
        self.sampler = self._get_train_sampler(trainer.train_dataset)
        if self.sampler.processes != args.world_size:
            raise ConfigError(
                f"ImportanceSampling: {args.world_size} processes train, and {self.sampler.processes} of them share "
                "minibatches; wanted processes of torch.distributed, as torchrun and accelerate launch start them"
            )
        self._passes = _Passes(self.sampler)
        return DataLoader(
            Weighted(trainer.train_dataset),
            batch_sampler=self._passes,
            collate_fn=_Collate(collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        trainer: Any = self
        assert self.sampler is not None
        state = self.sampler.state_dict()
        if trainer.args.should_save:
            torch.save(state, Path(output_dir, _STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        trainer: Any = self
        if checkpoint is None or self.sampler is None:
            return
        path = Path(checkpoint, _STATE)
        if not path.is_file():
            raise ConfigError(f"{checkpoint} holds no {_STATE}; resume from a checkpoint of a training with the mix-in")
        state = torch.load(path, weights_only=True)
        if trainer.args.ignore_data_skip:  # a new pass begins
            state["position"] = 0
        self.sampler.load_state_dict(state)
        self._passes.skipped = state["position"] % len(self.sampler)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        return None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        trainer: Any = self
        assert self.sampler is not None
        index, coefficient = inputs[INDEX], inputs[COEFFICIENT]
        with capture_norms(trainer.accelerator.unwrap_model(model)) as capture:
            loss: Tensor = super().training_step(model, inputs, None)  # type: ignore[misc]
            scaler = trainer.accelerator.scaler
            factor = 1.0 if scaler is None else float(scaler.get_scale())
            share = factor / (len(index) * trainer.current_gradient_accumulation_steps)
            norms = capture.norms(scale=coefficient.to(loss.device, torch.float32) * share)
        self.sampler.update(index, norms)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if COEFFICIENT not in inputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs=return_outputs)  # type: ignore[misc]
        given = {name: value for name, value in inputs.items() if name not in (INDEX, COEFFICIENT)}
        outputs = model(**{name: value for name, value in given.items() if name != "labels"})
        loss = weighted_mean(self.example_losses(outputs, given), inputs[COEFFICIENT])
        return (loss, outputs) if return_outputs else loss


class _Passes(Sampler[list[WeightedIndex]]):
    """The passes of a sampler; Trainer skips what a resumed pass has had, which the sampler does not yield again."""

    def __init__(self, sampler: ImportanceBatchSampler) -> None:
        self.sampler, self.skipped = sampler, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[WeightedIndex]]:
        skipped, self.skipped = self.skipped, 0
        for _ in range(skipped):
            yield []
        yield from self.sampler


class _Collate:
    """Adds index and coefficient to what Trainer's data collator makes of the examples."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[tuple[int, float, Any]]) -> dict[str, Any]:
        indices, coefficients, examples = zip(*rows, strict=True)
        batch = dict(self.collator(list(examples)))
        return {**batch, INDEX: default_collate(list(indices)), COEFFICIENT: default_collate(list(coefficients))}

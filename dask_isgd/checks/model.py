"""Try a model on a few examples, so that its mistakes show in the first second and not after an hour."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from dask_isgd.config import Scoring
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.incomplete import incomplete, replaced
from dask_isgd.core.loss import Loss
from dask_isgd.errors import ModelError
from dask_isgd.norms import NormEngine, check_training_mode, checked_losses
from dask_isgd.norms.tensor_trees import shapes_of
from dask_isgd.storage import Dataset

_PROBE_ROWS = 64
_KINDS = frozenset(
    (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
)


def check_parameters(module: nn.Module) -> None:
    """Raise ModelError with every tensor of the state that checkpoints and publications cannot hold."""
    wrong = [
        f"{name}: {_kind(tensor)}"
        for name, tensor in models.state_of(module).items()
        if tensor.dtype not in _KINDS or tensor.layout is not torch.strided or tensor.is_meta
    ]
    if wrong:
        raise ModelError(
            "model: checkpoints and publications hold dense tensors of real numbers, integers or booleans, but not "
            "these tensors of the model:\n"
            + "\n".join(wrong)
            + "\nRegister them with persistent=False or change their dtype"
        )


def _kind(tensor: Tensor) -> str:
    place = " without data (meta device)" if tensor.is_meta else ""
    layout = "" if tensor.layout is torch.strided else f" {str(tensor.layout).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{layout}{place}"


def check_model(
    module: nn.Module, loss: Loss, dataset: Dataset, scoring: Scoring, *, classify: bool
) -> tuple[float, int | None]:
    """Return the examples scored per second here, and the number of classes if the targets are classes."""
    rows = dataset.read(0, min(_PROBE_ROWS, len(dataset)))
    if scoring.skip_bad_chunks:
        rows = replaced(rows, incomplete(rows))
    inputs, targets = Prepare(dataset, torch.device("cpu"))(rows.inputs, rows.target)
    module.eval()
    with torch.no_grad():
        try:
            output = module(*inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
            raise ModelError(
                f"model: fails on inputs of shape {shapes}: {error}. Change the model or the dataset's inputs"
            ) from error
    classes = dataset.classes
    if classify:
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != len(targets):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(
                f"model: got an output of {got} for a batch of {len(targets)}, wanted logits of shape "
                f"({len(targets)}, classes) for cross entropy; pass loss=… to use another loss"
            )
        classes = int(output.shape[1])
        dataset.check(classes=classes)
    x = inputs if len(inputs) > 1 else inputs[0]
    _check_loss(loss, output, targets)
    check_training_mode(module, loss, x, targets)
    engine = NormEngine(module, loss, method=scoring.method, train_mode=scoring.train_mode, ignore=scoring.ignore)
    for _ in range(2):  # the audit, and the check of the second batch
        engine(x, targets)
    began = time.perf_counter()
    engine(x, targets)
    return len(targets) / max(time.perf_counter() - began, 1e-9), classes


def _check_loss(loss: Loss, output: Any, targets: Tensor) -> None:
    with torch.no_grad():
        try:
            checked_losses(loss, output, targets, len(targets))
        except RuntimeError as error:
            raise ModelError(f"the loss fails on {shapes_of(output, targets)}: {error}") from error

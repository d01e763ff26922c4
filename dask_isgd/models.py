"""From what a user passes as ``model`` to a module, and from a module to plain tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.errors import ModelError
from dask_isgd.storage import Dataset

ModelSource = Callable[[], nn.Module] | str
Loss = Callable[[Any, Any], Tensor]
Array = NDArray[Any] | Tensor


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each example, shape (B,): the default loss.

    ``output`` (B, classes) are logits, ``target`` (B,) class indices.
    """
    return nn.functional.cross_entropy(output, target, reduction="none")


def build(source: ModelSource, seed: int | None = None) -> nn.Module:
    """The module that ``source`` builds: a callable without arguments or ``"package.module:name"``.

    With ``seed`` the initial parameters are those of ``torch.manual_seed(seed)``.
    """
    factory: Any = source
    if isinstance(source, str):
        package, _, name = source.partition(":")
        try:
            factory = getattr(importlib.import_module(package), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ModelError(
                f"model: got {source!r}, wanted an importable 'package.module:name' ({error}); "
                "check the spelling and that the package is installed"
            ) from error
    if isinstance(factory, nn.Module):
        raise ModelError(
            f"model: got a module ({type(factory).__name__}), wanted a callable that builds one; "
            "pass the class or a function without arguments"
        )
    if not callable(factory):
        raise ModelError(f"model: got {source!r}, wanted a callable without arguments or 'package.module:name'")
    if seed is None:
        module = factory()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = factory()
    if not isinstance(module, nn.Module):
        raise ModelError(f"model: {source!r} returned {type(module).__name__}, wanted a torch.nn.Module")
    return module


def name_of(source: ModelSource) -> str:
    """A readable name of a model source."""
    return source if isinstance(source, str) else str(getattr(source, "__qualname__", type(source).__name__))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied tensors once, under their first name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    persistent = module.state_dict(keep_vars=True)
    tensors.update((name, buffer) for name, buffer in module.named_buffers() if name in persistent)
    return tensors


def signature(module: nn.Module) -> dict[str, list[Any]]:
    """Names, shapes and dtypes of the state: what a resumed run must match."""
    return {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in state_of(module).items()
    }


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy published or checkpointed tensors into a module."""
    state = state_of(module)
    if state.keys() != tensors.keys():
        raise ModelError(f"parameters: got {sorted(tensors)}, wanted {sorted(state)}; is it the same model?")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def device_of(name: str) -> torch.device:
    """The device a setting names; ``"auto"`` is cuda, mps or cpu, the first there is."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class Prepare:
    """Rows of a dataset as tensors on a device, normalised there.

    Floats become float32; integer targets int64. An input with a normalisation becomes
    ``(x - mean) / std`` in float32, any other integer input stays as it is (tokens).
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        constants = dataset.normalisation or {}
        self.device = device
        self._constants = [
            tuple(torch.as_tensor(np.asarray(c, np.float32)).to(device) for c in constants[name])
            if name in constants
            else None
            for name in dataset.input_names
        ]

    def __call__(self, inputs: Sequence[Array], target: Array) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(map(self._input, inputs, self._constants)), self._target(target)

    def _input(self, array: Array, constants: tuple[Tensor, ...] | None) -> Tensor:
        tensor = as_tensor(array).to(self.device, non_blocking=True)
        if constants is not None:
            mean, std = constants
            return (tensor.to(torch.float32) - mean) / std
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def _target(self, array: Array) -> Tensor:
        tensor = as_tensor(array).to(self.device, non_blocking=True)
        return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def as_tensor(array: Array) -> Tensor:
    """``array`` as a tensor of a dtype torch computes with; shares its memory where it can."""
    if isinstance(array, Tensor):
        return array
    if array.dtype in (np.uint16, np.uint32, np.uint64):  # torch knows little arithmetic on these
        array = array.astype(np.int64)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array)
    return torch.from_numpy(array)


def check_losses(losses: object, batch: int) -> Tensor:
    """The losses if there is one per example, else a ModelError with both shapes."""
    if not isinstance(losses, Tensor) or losses.shape != (batch,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ModelError(
            f"loss: got {got}, wanted one loss per example, shape {(batch,)}; "
            "return unreduced losses (reduction='none') and average over all but the first dimension"
        )
    return losses


def to_arrays(tensors: Mapping[str, Tensor]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors as numpy arrays, and the dtypes of those numpy does not know (bfloat16, as int16)."""
    odd = {name: "bfloat16" for name, t in tensors.items() if t.dtype == torch.bfloat16}
    arrays = {
        name: (t.view(torch.int16) if name in odd else t).detach().cpu().contiguous().numpy()
        for name, t in tensors.items()
    }
    return arrays, odd


def from_arrays(arrays: Mapping[str, NDArray[Any]], odd: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that ``to_arrays`` was given."""
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
    return {name: t.view(getattr(torch, odd[name])) if name in odd else t for name, t in tensors.items()}

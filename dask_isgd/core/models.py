"""Models: built from what a user passes as ``model``, and converted to plain tensors and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dask_isgd.errors import ConfigError, ModelError
from dask_isgd.names import named

ModelSource = Callable[[], nn.Module] | str


def build(source: ModelSource, seed: int | None = None) -> nn.Module:
    """Return the module that ``source`` builds: a callable without arguments or ``"package.module:name"``.

    With ``seed`` the initial parameters are those of ``torch.manual_seed(seed)``.
    """
    factory: Any = source
    if isinstance(source, str):
        try:
            factory = named(source)
        except ConfigError as error:
            raise ModelError(f"model: {error}") from error
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
    """Return a readable name of a model source."""
    return source if isinstance(source, str) else str(getattr(source, "__qualname__", type(source).__name__))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; tied tensors once, under their first name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    persistent = module.state_dict(keep_vars=True)
    tensors.update((name, buffer) for name, buffer in module.named_buffers() if name in persistent)
    return tensors


def signature(module: nn.Module) -> dict[str, list[Any]]:
    """Return names, shapes and dtypes of the state, which must be the same when a run is resumed."""
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
    """Return the device that a setting names; ``"auto"`` is the first available one of cuda, mps and cpu."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def to_arrays(tensors: Mapping[str, Tensor]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return tensors as numpy arrays, and the dtypes of those that numpy lacks (bfloat16, as int16)."""
    odd = {name: "bfloat16" for name, t in tensors.items() if t.dtype == torch.bfloat16}
    arrays = {
        name: (t.view(torch.int16) if name in odd else t).detach().cpu().contiguous().numpy()
        for name, t in tensors.items()
    }
    return arrays, odd


def from_arrays(arrays: Mapping[str, NDArray[Any]], odd: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors that ``to_arrays`` was given."""
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
    return {name: t.view(getattr(torch, odd[name])) if name in odd else t for name, t in tensors.items()}

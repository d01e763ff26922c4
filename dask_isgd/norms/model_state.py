"""The state of the user's model, which computing norms must not change."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dask_isgd.errors import ConfigError, ModelError


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; a shared one appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_supported(model: nn.Module) -> None:
    """Raise ModelError if examples have no gradient of their own, or a forward pass would change the parameters."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"got a scripted model ({model.original_name}), which torch runs outside Python: no layer of it can be "
            "watched. Wanted the Python module that was scripted"
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if module.max_norm is not None:
                raise ModelError(
                    f"got {type(module).__name__} {name!r} with max_norm={module.max_norm}, which rescales its weight "
                    "in every forward pass: scoring would change the model. Wanted max_norm=None; rescale the weight "
                    "after the optimizer's step instead"
                )
            if module.scale_grad_by_freq:
                raise ModelError(
                    f"got {type(module).__name__} {name!r} with scale_grad_by_freq=True, which divides gradients by "
                    "counts over the whole batch: no example has a gradient of its own. Wanted "
                    "scale_grad_by_freq=False"
                )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ModelError(
                f"got {type(module).__name__} {name!r} normalising by the batch's own statistics, which couples the "
                "examples: no example has a gradient of its own. Wanted a model that treats examples independently: "
                "score in eval mode (train_mode=False, with running statistics) or use GroupNorm or LayerNorm"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"got the lazy parameter {name!r} without a shape; run one batch through the model first")


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what a plan depends on: the modules, the parameters, and which of them are trainable."""
    # Called at every training step: generators of prefixed names would take ten times as long.
    found: list[Any] = []
    ahead: list[tuple[str, nn.Module | None]] = [("", model)]
    seen: set[int] = set()
    while ahead:
        key, module = ahead.pop()
        if module is None:
            continue
        found += (key, id(module), module.training)
        if id(module) not in seen:
            seen.add(id(module))
            for name, parameter in module._parameters.items():
                found += (name, id(parameter), parameter is not None and parameter.requires_grad)
            ahead += module._modules.items()
    return tuple(found)


def random_state(model: nn.Module) -> list[Tensor]:
    """Return the state of every random generator that a forward pass may use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _cuda_devices(model))]


def set_random_state(model: nn.Module, states: list[Tensor]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(model), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def autocast_without_cache() -> Iterator[None]:
    """Let autocast convert a parameter at each use inside: with its cache, autograd would see one use in all."""
    before = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def frozen(model: nn.Module, *, but: Collection[str] = ()) -> Iterator[None]:
    """Let no parameter ``but`` some require a gradient inside, so that backward forms none of a weight's size."""
    parameters = [parameter for name, parameter in trainable(model).items() if name not in but]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let tensors take the place of the named parameters inside, wherever a module holds them.

    Each module is visited once, whatever number of names it has. What the module derives from its parameters (the
    weight of a weight normalisation, the flat list of a recurrent layer) is restored too, also after an exception.
    """
    wanted = {id(model.get_parameter(name)): tensor for name, tensor in tensors.items()}
    places = [
        (module, key, parameter, wanted[id(parameter)])
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in wanted
    ]
    attributes = {module: dict(vars(module)) for module, *_ in places}
    try:
        for module, key, _, tensor in places:
            module._parameters[key] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, before in attributes.items():
            for key in vars(module).keys() - before.keys():
                del vars(module)[key]
            vars(module).update(before)
        for module, key, parameter, _ in places:
            module._parameters[key] = parameter


def as_written(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile wraps, or the model itself."""
    return dict(model.named_children()).get("_orig_mod", model)


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile has compiled the model or a part of it."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled modules inside the model as they were written: hooks do not run in compiled code."""
    modules = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    calls = [(module, module._compiled_call_impl) for module in modules]
    wrapped = [
        (parent, key, child)
        for parent in list(model.modules())
        for key, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]
    try:
        for module in modules:
            module._compiled_call_impl = None
        for parent, key, child in wrapped:
            parent._modules[key] = child._modules["_orig_mod"]
        yield
    finally:
        for module, call in calls:
            module._compiled_call_impl = call
        for parent, key, child in wrapped:
            parent._modules[key] = child


@contextmanager
def without(model: nn.Module, patterns: Collection[str]) -> Iterator[None]:
    """Let the parameters whose names match one of the patterns (``*.bias``) not be trainable inside.

    Raises ConfigError for a pattern that matches no trainable parameter.
    """
    found = {pattern: fnmatch.filter(trainable(model), pattern) for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            some = ", ".join(map(repr, list(trainable(model))[:4]))
            raise ConfigError(f"ignore: got {pattern!r}, wanted a pattern of trainable parameters, such as {some}")
    parameters = [model.get_parameter(name) for names in found.values() for name in names]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def preserved(model: nn.Module, train_mode: bool | None) -> Iterator[None]:
    """Run the model in a mode (None: the current one) and restore it afterwards.

    Restores mode, buffers, random state and hooks of parameters, also after an exception. Hooks of
    parameters are disabled inside: the norm is of the loss's gradient, not of what a hook makes of it.
    Gradients are enabled, whatever the caller has set, and nothing inside changes ``.grad``.
    """
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.callback(set_random_state, model, random_state(model))
        # In eval mode without gradients attention takes a fused path that does not call its layers.
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        modes, buffers = [], []  # restored by one callback each: a model has hundreds of them
        for module in model.modules():
            modes.append((module, module.training))
            if module._forward_pre_hooks:  # weight and spectral normalisation assign a tensor in each forward pass
                undo.callback(vars(module).update, {k: v for k, v in vars(module).items() if isinstance(v, Tensor)})
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    buffers.append((module, name, buffer, buffer.clone(), buffer._version))
        undo.callback(_restore, modes, buffers)
        for parameter in model.parameters():
            hooks = parameter._backward_hooks
            if hooks:
                undo.callback(hooks.update, dict(hooks))
                hooks.clear()
        if train_mode is not None:
            model.train(train_mode)
        undo.enter_context(uncompiled(model))
        yield


def _restore(modes: list[tuple[nn.Module, bool]], buffers: list[tuple[nn.Module, str, Tensor, Tensor, int]]) -> None:
    for module, training in modes:
        if module.training != training:
            module.training = training
    for module, name, buffer, content, version in buffers:
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer
        if buffer._version != version:
            with torch.no_grad():
                buffer.copy_(content)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    if not torch.cuda.is_available():
        return []
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=lambda device: device.index)

"""Try optimizer and scheduler at ``fit``: the learner calls their ``step`` once per update, without arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dask_isgd.config import Learning
from dask_isgd.errors import ConfigError, IsgdError, ModelError
from dask_isgd.learner.update import make_optimizer

_KEYS = {"learning_rate": "lr", "momentum": "momentum"}


def ignored_settings(learning: Learning) -> Iterator[str]:
    """Yield what is wrong with settings that are given beside an optimizer which does not take them."""
    optimizer = learning.optimizer
    if optimizer is None:
        return
    for name, key in _KEYS.items():
        value = getattr(learning, name)
        if value is None:
            continue
        kind = getattr(optimizer, "__qualname__", type(optimizer).__name__)
        own = getattr(optimizer, "keywords", {}).get(key)  # of a functools.partial
        if own is not None:
            yield f"Learning.{name}: got {value!r}, and Learning.optimizer sets {key}={own!r} itself; pass one of them"
        elif not _takes(optimizer, key):
            yield (
                f"Learning.{name}: got {value!r} beside Learning.optimizer={kind}, which takes no argument {key!r}; "
                f"set it inside the optimizer, or let {kind} take {key!r}"
            )


def check_optimizer(module: nn.Module, learning: Learning) -> None:
    """Raise ConfigError if optimizer or scheduler cannot be made, or need more than a call of ``step()``."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ModelError("model: got no trainable parameter, wanted at least one")
    optimizer = _made("optimizer", lambda: make_optimizer(parameters, learning))
    _require_plain_step("optimizer", optimizer, "a closure that computes the loss again", "SGD or Adam")
    if callable(make := learning.scheduler):
        scheduler = _made("scheduler", lambda: make(optimizer))
        _require_plain_step("scheduler", scheduler, "a metric", "CosineAnnealingLR or LinearLR")


def _made(setting: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except IsgdError:
        raise
    except Exception as error:  # the user's callable may raise anything
        raise ConfigError(f"Learning.{setting}: fails at its first call: {type(error).__name__}: {error}") from error


def _require_plain_step(setting: str, made: Any, needed: str, others: str) -> None:
    step = getattr(made, "step", None)
    if not callable(step):
        raise ConfigError(f"Learning.{setting}: returned {type(made).__name__}, wanted an object with a method step()")
    names = [
        p.name for p in inspect.signature(step).parameters.values() if p.kind in _POSITIONAL and p.default is _NONE
    ]
    if names:
        raise ConfigError(
            f"Learning.{setting}: the step of {type(made).__name__} needs {', '.join(names)} ({needed}), and the "
            f"learner calls step() once per update without any. Use another one, such as {others}"
        )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NONE = inspect.Parameter.empty


def _takes(function: Callable[..., Any], key: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return True
    return key in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

"""The registry of fast rules: how a type of layer turns its input and the gradient of its output into norms.

A rule is found by the exact type of a module: a subclass may compute something else. The exact fallback handles what no
rule serves, and the audit proves every rule on the user's own model.
Shapes: B examples, T positions, d inputs, p outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

Saved = tuple[Tensor, ...]
"""What a rule saves of one call until the gradient arrives; every tensor has the batch first."""


class Rule(Protocol):
    """Per-example gradients of one type of layer, at one call of it."""

    parameters: frozenset[str]
    """The names of the module's own parameters that the rule serves."""

    def save(self, module: Any, x: Tensor, unshared: frozenset[str], shared: frozenset[str]) -> Saved:
        """Return what ``norms`` of the parameters ``unshared`` and ``gradient`` of each of ``shared`` will need of
        the input ``x``."""

    def norms(self, module: Any, saved: Saved, grad: Tensor, names: frozenset[str]) -> Tensor:
        """Return (B,) ||∂L_n/∂θ||, θ being all the parameters ``names`` (the call's ``unshared``), float32 or wider.

        ``grad`` is the gradient of the *summed* loss with respect to the output of the call; it must not be
        modified.
        """

    def gradient(self, module: Any, saved: Saved, grad: Tensor, name: str) -> Tensor:
        """Return ∂L_n/∂θ of one parameter, materialised: (B, *shape of the parameter)."""


RULES: dict[type[nn.Module] | str, Rule] = {}
"""The rule of each type of layer; a type from an optional library is given by its full name."""

_R = TypeVar("_R", bound=Rule)


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule that serves a module, by its exact type."""
    kind = type(module)
    return RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}")


def register_rule(*kinds: type[nn.Module] | str) -> Callable[[type[_R]], type[_R]]:
    """Return a class decorator that registers a rule for modules of exactly these types (or full names of types).

    A rule registered earlier for a type is replaced. For a layer that scales each feature, x (B, ..., d)::

        class Scale(nn.Module):
            def __init__(self, features: int) -> None:
                super().__init__()
                self.factor = nn.Parameter(torch.ones(features))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.factor


        @register_rule(Scale)
        class ScaleRule:
            parameters = frozenset({"factor"})

            def save(self, module, x, unshared, shared):
                return (x,)

            def norms(self, module, saved, grad, names):
                return self.gradient(module, saved, grad, "factor").norm(dim=1)

            def gradient(self, module, saved, grad, name):
                product = saved[0] * grad  # (B, ..., d): sum over everything between the batch and the features
                return product.flatten(1, -2).sum(1) if product.ndim > 2 else product

    ``gradient`` serves parameters used at several calls; ``norms`` may be faster. Sum over the positions of
    an example *before* computing a norm. The audit proves the rule on the user's own model, or does not use it.
    """

    def register(rule: type[_R]) -> type[_R]:
        for kind in kinds:
            RULES[kind] = rule()
        return rule

    return register


from dask_isgd.norms.rules import convolution, embedding, linear, normalisation  # noqa: E402, F401  (they register)

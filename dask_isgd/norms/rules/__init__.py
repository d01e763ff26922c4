"""The registry of fast rules: how a type of layer turns its input and its output's gradient into norms.

A rule is looked up by the exact type of a module: a subclass may compute something else. What no
rule serves takes the exact fallback, and the audit proves every rule on the user's own model.
Shapes: B examples, T positions, d inputs, p outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

Kept = tuple[Tensor, ...]
"""What a rule keeps of one call until the gradient arrives; every tensor leads with the batch."""


class Rule(Protocol):
    """Per-example gradients of one type of layer, at one call of it."""

    parameters: frozenset[str]
    """The names of the module's own parameters that the rule serves."""

    def keep(self, module: Any, x: Tensor, alone: frozenset[str], shared: frozenset[str]) -> Kept:
        """What is needed of the input ``x`` for the ``norms`` of the parameters ``alone`` later, and for the
        ``gradient`` of each one of ``shared``."""

    def norms(self, module: Any, kept: Kept, grad: Tensor, names: frozenset[str]) -> Tensor:
        """||∂L_n/∂θ||, θ all the parameters ``names`` (``alone`` of the call) together: (B,) float32 or wider.

        ``grad`` is the gradient of the *summed* loss with respect to the output of the call, and not to be
        written into.
        """

    def gradient(self, module: Any, kept: Kept, grad: Tensor, name: str) -> Tensor:
        """∂L_n/∂θ of one parameter, materialised: (B, *shape of the parameter)."""


RULES: dict[type[nn.Module] | str, Rule] = {}
"""The rule of each type of layer; the type of a library that need not be installed by its full name."""

_R = TypeVar("_R", bound=Rule)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule that serves a module, by its exact type."""
    kind = type(module)
    return RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}")


def register_rule(*kinds: type[nn.Module] | str) -> Callable[[type[_R]], type[_R]]:
    """Class decorator: the rule serves modules of exactly these types (or full names of types).

    A rule that serves a type already takes its place. For a layer that scales each feature, x (B, ..., d)::

        class Scale(nn.Module):
            def __init__(self, features: int) -> None:
                super().__init__()
                self.factor = nn.Parameter(torch.ones(features))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.factor


        @register_rule(Scale)
        class ScaleRule:
            parameters = frozenset({"factor"})

            def keep(self, module, x, alone, shared):
                return (x,)

            def norms(self, module, kept, grad, names):
                return self.gradient(module, kept, grad, "factor").norm(dim=1)

            def gradient(self, module, kept, grad, name):
                product = kept[0] * grad  # (B, ..., d): sum over everything between the batch and the features
                return product.flatten(1, -2).sum(1) if product.ndim > 2 else product

    ``gradient`` serves parameters used at several calls; ``norms`` may be faster. Sum over the positions of
    an example *before* taking a norm. The audit proves the rule on the user's own model, or drops it.
    """

    def register(rule: type[_R]) -> type[_R]:
        for kind in kinds:
            RULES[kind] = rule()
        return rule

    return register


from dask_isgd.norms.rules import convolution, embedding, linear, normalisation  # noqa: E402, F401  (they register)

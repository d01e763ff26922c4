"""Per-example gradient norms: how much each example's loss moves the parameters.

::

    engine      gradient_norms, NormEngine: the audit once, then the fast pass and the fallback
    training    capture_norms: the norms of a training step, from its own backward pass
    audit       which parameters the fast rules serve, proved on a few examples -> NormPlan
    observe     what one ordinary pass shows of the graph
    coupling    examples that depend on each other: refused
    capture     hooks that take each layer's term as its gradient arrives
    fallback    one example's gradient at a time: vmap, or a loop
    rules/      one small file per family of layers, in one registry
    layouts     where the batch is in a layer that does not lead with it
    expansion   parameters of no layer with a rule, given out as one copy an example
    attention   nn.MultiheadAttention, opened so that rules can see its layers
    state       leaves the user's model as it was
    examples    inputs, targets and losses, example by example
"""

from dask_isgd.norms.engine import NormEngine, gradient_norms
from dask_isgd.norms.rules import RULES, Rule, register_rule
from dask_isgd.norms.tensor_trees import checked_losses
from dask_isgd.norms.training_capture import TrainingNorms, capture_norms

__all__ = [
    "RULES",
    "NormEngine",
    "Rule",
    "TrainingNorms",
    "capture_norms",
    "checked_losses",
    "gradient_norms",
    "register_rule",
]

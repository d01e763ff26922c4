"""Per-example gradient norms: how much each example's loss moves the parameters.

::

    one_batch           gradient_norms: the norms of one batch in one call, with the engine kept
    engine              NormEngine: the audit once, then the fast pass and the fallback
    training_capture    capture_norms: the norms of a training step, from its own backward pass
    training_plan       what of a training step the rules serve, and what is read off its graph
    shared_terms        finds parameters that can be read off the graph, and proves them
    training_graph      reads them: positions, scales, projections of attention
    audit               which parameters the fast rules serve, proved on a few examples -> NormPlan
    graph_trace         the graph of one ordinary forward pass
    coupling            detects examples that depend on each other, and refuses them
    training_mode       the same in train mode, and statistics that buffers keep of minibatches
    capture             hooks that compute each layer's term when its gradient arrives
    later_batches       which of the later batches are checked against autograd
    captured_layer      what is captured of one layer
    fallback            one example's gradient at a time: vmap, or a loop
    row_choices         which parameters meet rows that the values of the inputs choose
    rules/              one small file per family of layers, in one registry
    batch_layouts       where the batch is in a layer that does not have it first
    parameter_uses      what the graph does with each parameter
    per_example_copies  parameters of no layer with a rule, replaced with one copy per example
    attention           nn.MultiheadAttention, decomposed into layers that have rules
    model_state         restores the user's model
    tensor_trees        inputs, targets and losses, example by example
"""

from dask_isgd.norms.engine import NormEngine
from dask_isgd.norms.one_batch import gradient_norms
from dask_isgd.norms.rules import RULES, Rule, register_rule
from dask_isgd.norms.tensor_trees import checked_losses
from dask_isgd.norms.training_capture import TrainingNorms, capture_norms
from dask_isgd.norms.training_mode import check_training_mode

__all__ = [
    "RULES",
    "NormEngine",
    "Rule",
    "TrainingNorms",
    "capture_norms",
    "check_training_mode",
    "checked_losses",
    "gradient_norms",
    "register_rule",
]

"""Per-example gradient norms: how much each example's loss moves the parameters.

::

    one_batch           gradient_norms: the norms of one batch in one call, with the engine kept
    engine              NormEngine: the audit once, then the fast pass and the fallback
    training_capture    capture_norms: the norms of a training step, from its own backward pass
    training_plan       whether a training step yields all the norms
    audit               which parameters are served, proved on a few examples -> NormPlan
    audit_batch         these examples, and autograd's norms of two of them
    norm_plan           NormPlan: how the norms of one model are computed
    graph_trace         the graph of one ordinary forward pass
    coupling            detects examples that depend on each other, and refuses them
    training_mode       the same in train mode, and statistics that buffers keep of minibatches
    capture             hooks that compute each layer's term when its gradient arrives
    captured_layer      what is captured of one layer
    rules/              one small file per family of layers, in one registry
    batch_layouts       where the batch is in a layer that does not have it first
    graph_reader        reads the norms of other parameters off the graph: positions, scales, attention, derived weights
    shared_terms        finds where parameters meet the examples
    meetings            one function per operation: where parameters meet the examples
    uses                the gradients of each example at a meeting, or the factors that they are a product of
    row_owners          whose each row is, where an index chose the rows: read in each batch
    readings            the norm of one use of a parameter, and of the sum of several
    graph_nodes         what a node is, what it feeds, and its gradients for a batch
    per_example_copies  parameters of neither, replaced with one copy per example
    fallback            one example's gradient at a time: vmap, or a loop
    later_batches       which of the later batches are checked against autograd
    row_choices         which parameters meet rows that the values of the inputs choose, and by which indices
    parameter_uses      what the graph does with each parameter
    recurrent           recurrent layers step by step
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

"""The columns of a run's history and its live figures: name, label, unit and meaning, for every display."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column of numbers."""

    name: str
    label: str
    """What terminal, notebook, plots and dashboard call it."""
    unit: str
    """``"fraction"``, ``"ratio"`` and ``"switch"`` (0 or 1) decide how a value is written; "" if it has none."""
    meaning: str
    announced: bool = True
    """Whether progress events carry it: an event stays below a kilobyte."""


HISTORY = (
    Column("step", "step", "steps", "optimizer updates made so far"),
    Column("seconds", "time", "seconds", "time for which the run has been training, over all incarnations"),
    Column("examples", "examples", "examples", "examples drawn so far, with repetition"),
    Column("loss", "training loss", "", "estimate of the mean training loss, averaged since the last report"),
    Column("gradient_norm", "gradient norm", "", "norm of the minibatch's gradient before clipping, averaged"),
    Column("clipped", "clipped", "fraction", "steps whose gradient was clipped, since the last report"),
    Column(
        "clip_bias",
        "bias of clipping",
        "ratio",
        "norm of the mean clipped minus the mean unclipped gradient, over the norm of the latter",
        False,
    ),
    Column("learning_rate", "learning rate", "", "learning rate of the optimizer's first group of parameters"),
    Column("steps_per_second", "steps per second", "steps per second", "speed since the last report"),
    Column(
        "mean_gradient_sq_norm",
        "squared norm of the mean gradient",
        "",
        "unbiased estimate of the mean gradient's squared norm; it may be negative",
    ),
    Column("variance_ideal", "ideal", "", "trace of the gradient's covariance for one draw from the best proposal"),
    Column("variance_stale", "as drawn", "", "the same for one draw from the proposal in force"),
    Column("variance_uniform", "uniform", "", "the same for one uniform draw"),
    Column(
        "noise_scale",
        "noise scale",
        "examples",
        "minibatch size at which the noise of uniform draws equals the mean gradient: variance_uniform over its "
        "squared norm; below the minibatch size, variance is not what holds training back",
    ),
    Column("gain", "gain", "ratio", "second moment under uniform draws over that under the proposal in force"),
    Column("candidate_gain", "gain if drawn by weight", "ratio", "gain that draws by weight have or would have"),
    Column("ideal_gain", "ideal gain", "ratio", "gain of the stored weights if none of them were stale"),
    Column("gate", "gate", "switch", "1 if draws follow the weights, 0 if they are uniform"),
    Column("ess_fraction", "effective sample size", "fraction", "(Σq)² / (N Σq²) of the proposal; 1 if it is uniform"),
    Column(
        "largest_coefficient",
        "largest coefficient",
        "",
        "1/(N q) of the least probable example; with fading, an upper bound",
    ),
    Column("mean_weight", "mean weight", "gradient norm", "mean of the stored weights"),
    Column("scored_fraction", "scored fraction", "fraction", "examples that have a weight"),
    Column("mean_age", "mean age", "steps", "mean age of the weights"),
    Column("max_age", "largest age", "steps", "age of the oldest weight"),
    Column("variance_ideal_error", "error of ideal", "", "half-width of variance_ideal's 95 % interval", False),
    Column("variance_stale_error", "error of as drawn", "", "half-width of variance_stale's 95 % interval", False),
    Column("variance_uniform_error", "error of uniform", "", "half-width of variance_uniform's 95 % interval", False),
    Column("gain_error", "error of the gain", "ratio", "half-width of gain's 95 % interval", False),
    Column(
        "candidate_gain_error",
        "error of the gain if drawn by weight",
        "ratio",
        "half-width of candidate_gain's 95 % interval",
        False,
    ),
    Column("smoothing_factor", "cost of smoothing", "ratio", "what smoothing divides the ideal gain by", False),
    Column("staleness_factor", "cost of staleness", "ratio", "what stale weights divide the ideal gain by", False),
    Column(
        "gate_gain",
        "gain seen by the gate",
        "ratio",
        "smoothed gain by which the gate opens and closes; begins again when it closes",
        False,
    ),
    Column(
        "gate_state",
        "state of the gate",
        "",
        "0 uniform draws configured, 1 kept open, 2 measuring, 3 closed, 4 open",
        False,
    ),
    Column("feedback", "feedback", "fraction", "steps whose own norms were fed back, since the last report", False),
    Column("threads", "threads", "threads", "torch threads of the learner", False),
    Column("learners", "learners", "learners", "learners that shared each minibatch", False),
    Column("learners_scoring", "learners that score", "workers", "workers that could learn, and score instead", False),
    Column(
        "roles_worth",
        "worth of other roles",
        "ratio",
        "at the latest judgement: progress per second, measured or predicted, with the best other number of learners "
        "that score, over the progress then; NaN if there is no choice or nothing was measured",
        False,
    ),
)
"""The learner's reports: one row per ``report_every`` steps (``Run.history``)."""

EVALUATION = (
    Column("step", "step", "steps", "version that was evaluated"),
    Column("loss", "validation loss", "", "mean loss over the validation data"),
    Column("error", "validation error", "fraction", "validation examples classified wrongly; NaN without classes"),
    Column("seconds", "time", "seconds", "time that the evaluation took"),
)
"""The evaluations of the validation data: one row per version evaluated (``Run.evaluations``)."""

LIVE = (
    Column(
        "validation_error",
        "validation error",
        "fraction",
        "validation examples classified wrongly, at the latest evaluation",
    ),
    Column("validation_loss", "validation loss", "", "mean loss over the validation data, at the latest evaluation"),
    Column("examples_scored", "examples scored", "examples", "examples scored by the current coordinator"),
    Column("scored_per_second", "scored per second", "examples per second", "current speed of all scorers together"),
    Column("learned_per_second", "learned per second", "examples per second", "speed of the learner (dashboard only)"),
    Column("published_behind", "published", "steps", "age of the latest published version (dashboard only)"),
    Column("scored_behind", "in use by scorers", "steps", "age of the latest version scored with (dashboard only)"),
    Column("steps", "steps", "steps", "steps of the run"),
    Column("faults", "faults", "", "faults since the run was first seen"),
    Column("incarnation", "incarnation", "", "current incarnation of the learner"),
)
"""Further figures of ``Run.latest`` and the dashboard, which events carry and no history keeps."""

LEGEND = {
    "training loss": "like gain and spread, the mean of the last tenth of the reports",
    "gain": "how many times as many examples uniform draws need for a gradient with as little noise; above 1 it pays",
    "spread": "standard deviation of the gradient of one draw, with the best weights, those in use, and uniform draws",
    "steps per second": "over the entire run",
}
"""Words of the summary, as a newcomer reads them; the others are in docs/glossary.md."""
NAMES = tuple(column.name for column in HISTORY)
ANNOUNCED = tuple(column.name for column in HISTORY if column.announced)
COLUMNS = {column.name: column for column in (*LIVE, *HISTORY)}
"""Columns of ``Run.latest`` by name."""


def label(name: str) -> str:
    """Return what every display calls a column of ``Run.latest``."""
    return COLUMNS[name].label

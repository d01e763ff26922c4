"""Bad input gets a clear error that names the thing, before a cluster is asked for anything."""

from __future__ import annotations

import re
import shutil

import dask.config
import numpy as np
import pytest
import torch
from torch import nn

import dask_isgd as isgd
from dask_isgd.checks import request
from dask_isgd.checks.request import PreparedRun, create
from dask_isgd.core.loss import bce
from dask_isgd.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    LabelError,
    LeaseLostError,
    LengthMismatchError,
    MissingChunkError,
    ModelError,
    NonFiniteLossError,
    NonFiniteNormsError,
    RunExistsError,
)
from dask_isgd.learner.trainer import Trainer
from dask_isgd.sampling import ImportanceSampler
from dask_isgd.scorer import task
from dask_isgd.storage import Dataset, RunDirectory, WeightArray, write_dataset

N = 40
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 6)).astype("f4")
Y = (np.arange(N) % 3).astype("i8")


def data(folder, name="data.zarr", **changes) -> Dataset:
    settings = {"inputs": ["x"], "target": "y", "chunk_size": 10, "classes": None}
    arrays = {"x": changes.pop("x", X), "y": changes.pop("y", Y)}
    write_dataset(str(folder / name), "train", arrays, **{**settings, **changes})
    return Dataset(folder / name, group="train")


def model() -> nn.Module:
    return nn.Linear(6, 3)


def check(folder, dataset=None, source=model, **changes) -> PreparedRun:
    dataset = data(folder) if dataset is None else dataset
    return request.prepare(
        request.RunRequest(
            model=source, data=dataset, run_dir=folder / "run", **{"learning": isgd.Learning(steps=10), **changes}
        )
    )


def test_what_is_right_passes(tmp_path):
    assert check(tmp_path).spec.examples == N


class TestSettings:
    def test_all_mistakes_of_one_kind_at_once(self):
        with pytest.raises(ConfigError) as caught:
            isgd.Learning(
                steps=-1, batch_size=0.5, learning_rate="fast", device="auto", cache_memory="much", synchronous="yes"
            )
        for name in ("steps", "batch_size", "learning_rate", "cache_memory", "synchronous"):
            assert f"Learning.{name}: got " in str(caught.value)
        assert "wanted a whole number at least 1" in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "values", "says"),
        [
            (isgd.Learning, {"steps": 1, "bach_size": 3}, "unknown key 'bach_size'; did you mean 'batch_size'?"),
            (isgd.Sampling, {"smoothin": 1.0}, "did you mean 'smoothing'?"),
            (isgd.Scoring, {"zzz": 1}, "unknown key 'zzz'; known: passes, method"),
        ],
    )
    def test_the_nearest_key_is_suggested(self, kind, values, says):
        with pytest.raises(ConfigError, match=re.escape(says)):
            kind(**values)

    def test_the_nearest_choice_is_suggested(self):
        with pytest.raises(ConfigError, match="did you mean 'stratified'"):
            isgd.Sampling(scheme="stratifed")

    def test_at_fit_all_of_dasks_configuration_and_of_the_arguments_at_once(self, tmp_path):
        wrong = {"isgd.learning.bach-size": 3, "isgd.scorin.method": "exact"}
        with dask.config.set(wrong), pytest.raises(ConfigError) as caught:
            check(tmp_path, sampling={"smoothing": 1.0})
        message = str(caught.value)
        assert "sampling: got dict, wanted dask_isgd.Sampling(…)" in message
        assert "unknown key isgd.learning.bach-size; did you mean isgd.learning.batch-size?" in message
        assert "unknown key isgd.scorin; did you mean isgd.scoring?" in message

    def test_at_fit_device_and_chunk_at_once(self, tmp_path):
        with pytest.raises(ConfigError) as caught:
            check(tmp_path, learning=isgd.Learning(steps=1, device="gpu"), scoring=isgd.Scoring(chunk_size=15))
        assert "Learning.device: got 'gpu'" in str(caught.value)
        assert "Scoring.chunk_size: got 15, wanted a multiple of 10" in str(caught.value)

    def test_a_synchronous_run_skips_no_chunk(self, tmp_path):
        with pytest.raises(ConfigError, match="skip_bad_chunks: got True, wanted False"):
            check(
                tmp_path,
                learning=isgd.Learning(steps=1, synchronous=True),
                scoring=isgd.Scoring(skip_bad_chunks=True),
            )

    @pytest.mark.parametrize(
        ("learning", "sampling", "message"),
        [
            ({"synchronous": True}, {}, "Scoring.passes: got 0, wanted 'auto': Learning.synchronous"),
            ({}, {"feedback": False}, "Sampling.feedback: got False, wanted True: with Scoring.passes=0"),
            ({}, {"max_age_steps": 9}, "Sampling.max_age_steps: got 9, wanted None: with Scoring.passes=0"),
        ],
    )
    def test_without_scores_the_weights_must_come_from_feedback(self, tmp_path, learning, sampling, message):
        settings = {"learning": isgd.Learning(steps=1, **learning), "scoring": isgd.Scoring(passes=0)}
        dataset = data(tmp_path)
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(tmp_path, dataset, sampling=isgd.Sampling(**sampling), **settings)
        check(tmp_path, dataset, sampling=isgd.Sampling(uniform=True), **settings)

    @pytest.mark.parametrize(
        ("learning", "message"),
        [
            ({"sync_every": 8}, "Learning.sync_every: got 8, wanted 1: a single learner"),
            ({"sync_every": 5, "learners": 2}, "Learning.publish_every: got 32, wanted a multiple of 5"),
            ({"outer_momentum": 0.9, "learners": 2}, "Learning.outer_momentum, outer_rate: wanted 0 and 1"),
        ],
    )
    def test_averages_need_learners_that_publish_them(self, tmp_path, learning, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(tmp_path, learning=isgd.Learning(steps=1, **learning))

    @pytest.mark.parametrize(
        ("scheduler", "given", "smoothing", "steps"),
        [(None, None, 0.7, None), ("cosine", None, 0.3, 1000.0), ("cosine", 0.5, 0.5, 1000.0)],
    )
    def test_smoothing_and_averages_suit_the_rate_unless_they_are_set(
        self, tmp_path, scheduler, given, smoothing, steps
    ):
        learning = isgd.Learning(steps=1, scheduler=scheduler)
        plan = check(tmp_path, learning=learning, sampling=isgd.Sampling(smoothing=given))
        assert plan.spec.sampling.smoothing == plan.document["config"]["sampling"]["smoothing"] == smoothing
        assert plan.spec.sampling.ema_steps == steps

    def test_a_minibatch_larger_than_the_data_is_said(self, tmp_path, caplog):
        check(tmp_path)
        assert "a minibatch of 128 from 40 examples draws some of them repeatedly" in caplog.text

    def test_one_example_is_enough(self, tmp_path):
        dataset = data(tmp_path, x=X[:1], y=Y[:1])
        assert check(tmp_path, dataset).spec.n_chunks == 1
        sampler = ImportanceSampler(1, 1, isgd.Sampling())
        assert (sampler.draw(5, np.random.default_rng(0)).coefficients == 1).all()


class TestData:
    @pytest.mark.parametrize(
        ("labels", "says"),
        [
            (np.where(np.arange(N) == 17, 3, Y), r"3.*17|17.*3"),
            (np.where(np.arange(N) == 5, -100, Y), r"-100.*5|5.*-100"),
        ],
        ids=["too large", "-100"],
    )
    def test_a_label_out_of_range_is_named_with_its_place(self, tmp_path, labels, says):
        with pytest.raises(LabelError, match=says):
            check(tmp_path, data(tmp_path, y=labels))

    def test_float_labels_are_refused_integers_of_any_kind_taken(self, tmp_path):
        with pytest.raises((LabelError, ModelError)):
            check(tmp_path, data(tmp_path, y=Y.astype("f4")))
        for dtype in ("u1", "i2", "i4"):
            assert check(tmp_path, data(tmp_path, f"{dtype}.zarr", y=Y.astype(dtype)))

    def test_no_examples(self, tmp_path):
        with pytest.raises((EmptyDatasetError, ValueError)):
            check(tmp_path, data(tmp_path, x=X[:0], y=Y[:0]))

    def test_lengths_differ(self, tmp_path):
        with pytest.raises(LengthMismatchError, match=r"40.*39|39.*40"):
            data(tmp_path, y=Y[:-1])

    def test_a_split_that_is_not_there(self, tmp_path):
        with pytest.raises(EmptyDatasetError, match="test"):
            data(tmp_path).split("test")

    def test_a_missing_chunk_is_named(self, tmp_path):
        dataset = data(tmp_path)
        shutil.rmtree(tmp_path / "data.zarr" / "train" / "x" / "c" / "0")
        with pytest.raises(MissingChunkError, match="array 'train/x', chunk 0 was never written"):
            check(tmp_path, dataset)

    def test_a_path_that_holds_nothing(self, tmp_path):
        with pytest.raises((DataError, OSError), match="nowhere"):
            check(tmp_path, str(tmp_path / "nowhere.zarr"))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x).sum(1)


class Complex(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("nothing", torch.empty(5, device="meta"))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Frozen(nn.Module):
    """Batch normalisation with frozen statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = with_batch_norm()

    def forward(self, x):
        return self.layers(x)

    def train(self, mode=True):
        super().train(mode)
        self.layers[1].eval()
        return self


class RunningMean(nn.Module):
    """A layer that no list of names holds: it centres by a mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.linear(x - self.mean)


class Counter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)


class Centred(nn.Linear):
    """Couples the examples in train mode, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x):
        return super().forward(x - x.mean(0) if self.training else x)


class Positions(nn.Module):
    """Learned positions before attention, as in GPT and BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(1, 8), nn.Parameter(torch.zeros(6, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(self.embed(x[..., None]) + self.positions).mean(1))


@pytest.mark.parametrize(
    ("scoring", "says"),
    [
        (
            {"ignore": ["9.*"]},
            r"ignore: got '9\.\*', wanted a pattern of trainable parameters, such as 'weight', 'bias'",
        ),
        ({"ignore": ["weight"], "method": "loss"}, "ignore: got .* with method='loss', wanted method='exact'"),
        ({"ignore": "weight"}, "Scoring.ignore: got 'weight', wanted a list of strings"),
    ],
)
def test_parameters_to_ignore(tmp_path, scoring, says):
    with pytest.raises(ConfigError, match=says):
        check(tmp_path, scoring=isgd.Scoring(**scoring))


class TestTrainMode:
    """The learner trains in train mode, whatever mode scorers use."""

    @pytest.mark.parametrize("train_mode", [False, True])
    @pytest.mark.parametrize(
        ("source", "says"),
        [
            (with_batch_norm, r"BatchNorm1d '1' \(running_mean, running_var\)"),
            (lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)), "gradient with"),
            (RunningMean, r"RunningMean '' \(mean\)"),
            (Centred, "gradient with respect to another example"),
        ],
        ids=["BatchNorm", "no buffers", "own buffer", "own coupling"],
    )
    def test_examples_that_are_mixed_or_remembered_are_refused(self, tmp_path, source, says, train_mode):
        with pytest.raises(ModelError, match=f"(?s){says}.*GroupNorm.*freeze"):
            check(tmp_path, source=source, scoring=isgd.Scoring(train_mode=train_mode))

    def test_what_fails_in_train_mode_only(self, tmp_path):
        class Broken(nn.Linear):
            def forward(self, x):
                return super().forward(x[:, :5] if self.training else x)

        with pytest.raises(ModelError, match=r"fails in the learner.s train mode: .*shapes"):
            check(tmp_path, source=lambda: Broken(6, 3))

    @pytest.mark.parametrize(
        "source",
        [
            Frozen,
            Counter,
            Positions,
            lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)),
        ],
        ids=["frozen", "counter", "positions", "GroupNorm and Dropout", "spectral norm"],
    )
    def test_others_pass(self, tmp_path, source):
        assert check(tmp_path, source=source).spec.examples == N


class TestModel:
    @pytest.mark.parametrize(
        ("source", "changes", "says"),
        [
            ("nowhere:model", {}, "wanted an importable 'package.module:name'"),
            (nn.Linear(6, 3), {}, "wanted a callable that builds one"),
            (lambda: 3, {}, "returned int, wanted a torch.nn.Module"),
            (lambda: nn.Linear(5, 3), {}, r"fails on inputs of shape \(40, 6\) float32"),
            (Flat, {}, r"got an output of \(40,\).*wanted logits of shape \(40, classes\)"),
            (
                model,
                {"loss": nn.functional.cross_entropy},
                r"loss returned shape \(\).*wanted one .*loss per example, shape \(",
            ),
            (model, {"loss": lambda o, t: o}, r"loss returned shape \(40, 3\).*wanted one .*loss per example"),
            (
                lambda: nn.Linear(6, 2),
                {"loss": lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")},
                r"the loss fails on an output of shape \(40, 2\) float32 and targets .*\(40,\) int64: Target 2",
            ),
            (
                lambda: nn.Linear(6, 2),
                {"loss": lambda o, t: (o - t) ** 2},
                r"the loss fails on an output of shape \(40, 2\) float32 and targets",
            ),
            (model, {"loss": "mse"}, r"got an output of shape \(40, 3\) for targets of shape \(40,\)"),
            (Complex, {}, r"(?s)phase: \(2,\) complex64.*nothing: \(5,\) float32 without data"),
        ],
        ids=[
            "spelling",
            "a module",
            "no module",
            "input",
            "output",
            "mean loss",
            "matrix loss",
            "too few outputs",
            "shapes",
            "mse of classes",
            "tensors",
        ],
    )
    def test_what_is_wrong_is_said_with_what_was_wanted(self, tmp_path, source, changes, says):
        with pytest.raises(ModelError, match=says):
            check(tmp_path, source=source, **changes)

    def test_labels_of_a_binary_loss(self, tmp_path):
        with pytest.raises(LabelError, match=r"labels from 0 to 2, wanted 0 to 1"):
            check(tmp_path, source=lambda: nn.Linear(6, 1), loss="bce")
        binary = data(tmp_path, "binary.zarr", y=Y % 2)
        assert check(tmp_path, binary, source=lambda: nn.Linear(6, 1), loss="bce").spec.loss is bce

    def test_a_loss_that_is_not_finite_stops_before_the_update(self):
        trainer = Trainer(model(), lambda o, t: o.sum(1) * float("nan"), isgd.Learning(steps=1))
        before = [p.clone() for p in trainer.parameters]
        with pytest.raises(NonFiniteLossError, match=r"step 7: .* 4 of 4 examples .*indices \[30, 31, 32, 33\]"):
            trainer.step(7, (torch.ones(4, 6),), torch.zeros(4).long(), np.ones(4), indices=np.arange(30, 34))
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


class TestNorms:
    @pytest.fixture
    def weights(self, tmp_path) -> WeightArray:
        weights = WeightArray.create(tmp_path / "w", 500, 500)
        weights.write(0, np.full(500, 2.0))
        return weights

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
    def test_a_few_bad_norms_leave_the_former_weights(self, weights, bad):
        norms = np.ones(500, "f4")
        norms[[3, 77]] = bad
        assert task._keep_former(norms, weights, 0, 0, strict=False) == 2
        assert norms[[3, 77]].tolist() == [2.0, 2.0]
        assert np.isfinite(norms).all()

    def test_more_than_one_in_a_hundred_is_an_error(self, weights):
        norms = np.ones(500, "f4")
        norms[10:16] = np.nan
        with pytest.raises(NonFiniteNormsError, match=r"chunk 0: got 6 of 500 .*first: example 10.*wanted at most 1 %"):
            task._keep_former(norms, weights, 0, 0, strict=False)

    def test_bad_norms_of_many_minibatches_are_few_lines(self, caplog):
        sampler = ImportanceSampler(N, 10, isgd.Sampling())
        for step in range(100):
            assert sampler.feedback(np.arange(4), [1.0, np.nan, 2.0, np.inf], step) == 2
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["step 0", "step 9", "step 99"]

    def test_weights_that_are_all_zero_draw_uniformly(self):
        sampler = ImportanceSampler(N, 10, isgd.Sampling(gate="open", smoothing=0.0))
        for chunk in range(4):
            sampler.update(chunk, np.zeros(10, "f4"), 0)
        sampler.refresh(0)
        draw = sampler.draw(1000, np.random.default_rng(0))
        assert draw.indices.min() >= 0
        assert draw.indices.max() < N
        assert np.allclose(draw.coefficients, 1.0)


class TestStorage:
    @pytest.mark.parametrize(
        ("chunk", "values", "says"),
        [
            (4, np.ones(10), "got chunk 4, wanted 0 to 3"),
            (0, np.ones(9), r"got shape \(9,\), wanted \(10,\); nothing was written"),
            (0, np.full(10, 1e300), "beyond float32"),
            (0, np.array(["a"] * 10), "wanted real numbers"),
        ],
        ids=["off the grid", "length", "lossy", "text"],
    )
    def test_weights_that_do_not_fit_are_refused_before_anything_is_written(self, tmp_path, chunk, values, says):
        weights = WeightArray.create(tmp_path / "w", N, 10)
        with pytest.raises(ValueError, match=says):
            weights.write(chunk, values)
        assert np.isnan(weights.read_all()).all()

    def test_a_taken_directory(self, tmp_path):
        create(check(tmp_path))
        with pytest.raises(RunExistsError, match=r"resume=True.*overwrite=True"):
            check(tmp_path, Dataset(tmp_path / "data.zarr", group="train"))

    def test_the_older_of_two_learners_is_told(self, tmp_path):
        leases = RunDirectory(tmp_path / "run").leases()
        older, _ = leases.acquire({}), leases.acquire({})
        with pytest.raises(LeaseLostError, match="incarnation 1 is fenced: incarnation 2 holds the run"):
            older.check()

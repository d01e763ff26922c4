"""One pass over a dataset on a cluster: scores and outputs, resumed after an interruption."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import dask_isgd as isgd
from dask_isgd.core.batch import Prepare
from dask_isgd.core.carried_model import CarriedModel
from dask_isgd.core.loss import cross_entropy
from dask_isgd.core.models import build, load, state_of
from dask_isgd.errors import ConfigError, ModelError, RunExistsError, RunMismatchError
from dask_isgd.pipelines.cli import isgd as cli

MODEL = "dask_isgd.pipelines.models:digits"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(MODEL, seed=3).eval()


@pytest.fixture(scope="module")
def batch(digits):
    rows = digits.read(0, len(digits))
    return Prepare(digits, torch.device("cpu"))(rows.inputs, rows.target)


def small(digits) -> isgd.Scoring:
    return isgd.Scoring(chunk_size=digits.chunk_size)


@pytest.mark.parametrize("method", ["exact", "bound", "loss"])
def test_scores_are_those_of_the_model_and_xarray_opens_them(client, digits, model, batch, tmp_path, method):
    found = isgd.score(client, model, digits, tmp_path / "s.zarr", method=method, scoring=small(digits))
    (x,), y = batch
    assert found.values == pytest.approx(isgd.gradient_norms(model, cross_entropy, x, y, method=method), rel=1e-4)
    assert xr.open_zarr(tmp_path / "s.zarr")["score"].dims == ("sample",)


def test_outputs_are_those_of_the_model(client, digits, model, batch, tmp_path):
    found = isgd.predict(client, model, digits, tmp_path / "p.zarr", scoring=small(digits))
    with torch.no_grad():
        assert found.values == pytest.approx(model(*batch[0]).numpy(), abs=1e-5)
    assert found.dims == ("sample", "class")


def test_an_interrupted_pass_does_what_is_left(client, digits, model, tmp_path):
    """And another model's, or other files, are not overwritten."""
    score = partial(isgd.score, client, data=digits, url=tmp_path / "s.zarr", method="loss", scoring=small(digits))
    calls: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        calls.append((done, total))
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, progress=interrupt)
    at = calls[-1][0]
    assert calls[0] == (0, len(digits))
    assert 0 < at < len(digits)
    calls.clear()
    found = score(model, progress=lambda done, total: calls.append((done, total))).values
    assert calls[0] == (at, len(digits))
    assert calls[-1] == (len(digits), len(digits))
    assert np.isfinite(found).all()
    with pytest.raises(RunMismatchError, match="model differ"):
        score(build(MODEL, seed=4))
    assert (score(build(MODEL, seed=4), overwrite=True).values != found).any()
    (tmp_path / "s.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match=r"holds notes\.txt"):
        score(model, overwrite=True)


def test_a_loss_by_its_name(client, digits, tmp_path):
    regression = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
    with pytest.raises(ConfigError, match="did you mean"):
        isgd.score(client, regression, digits, tmp_path / "s.zarr", loss="msee")
    found = isgd.score(
        client, regression, digits, tmp_path / "s.zarr", method="loss", loss="mse", scoring=small(digits)
    )
    (x,), y = Prepare(digits, torch.device("cpu"))(*digits.read(0, len(digits))[:2])
    with torch.no_grad():
        assert found.values == pytest.approx(((regression(x).squeeze(1) - y) ** 2).numpy(), rel=1e-4)


def test_a_module_travels_without_its_tensors_and_keeps_its_ties():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(400, 400), torch.nn.Linear(400, 400)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.ones(400))
            self.register_buffer("shift", torch.full((400,), 2.0), persistent=False)

        def forward(self, x):
            return self.second(self.first(x * self.scale) + self.shift)

    module = Tied()
    made = CarriedModel(module)()
    assert made.second.weight is made.first.weight
    load(made, state_of(module))
    x = torch.randn(2, 400)
    assert torch.equal(made(x), module(x))
    assert sum(p.numel() for p in CarriedModel(module)._structure.parameters() if not p.is_meta) == 0


class TwoOutputs(torch.nn.Module):
    def forward(self, x):
        return x, x


def test_a_model_of_two_outputs_is_refused(client, digits, tmp_path):
    with pytest.raises(ModelError, match="wanted one tensor with the batch first"):
        isgd.predict(client, TwoOutputs(), digits, tmp_path / "p.zarr")


def test_the_commands_use_a_runs_checkpoint(client, digits, tmp_path):
    run = isgd.fit(client, MODEL, digits, tmp_path / "run", learning=isgd.Learning(steps=4))
    run.wait(timeout=120)
    options = ["--data", str(digits.url), "--group", "train", "--scheduler", client.scheduler.address]
    for command in ("score", "predict"):
        result = CliRunner().invoke(cli, [command, str(tmp_path / "run"), *options, "--to", str(tmp_path / command)])
        assert result.output.splitlines()[-1] == str(tmp_path / command), result.output
    found = xr.open_zarr(tmp_path / "predict")["output"].values
    (x,), _ = Prepare(digits, torch.device("cpu"))(*digits.read(0, 10)[:2])
    with torch.no_grad():
        assert found[:10] == pytest.approx(run.model()(x).numpy(), abs=1e-5)
    assert len(xr.open_zarr(tmp_path / "score")["score"]) == len(digits)

"""Missing values are found before training; a run that was told to skip them trains as if their loss were zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dask_isgd.checks import finite
from dask_isgd.checks.finite import find_missing
from dask_isgd.checks.request import RunRequest, prepare
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.core.batch import Prepare
from dask_isgd.core.incomplete import complete_only, incomplete, replaced
from dask_isgd.errors import DataError
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.feed import open_feed
from dask_isgd.learner.trainer import Trainer
from dask_isgd.pipelines import ingest
from dask_isgd.storage import Dataset, Rows, write_dataset

N, BAD = 64, [3, 40]
X = np.random.default_rng(0).normal(size=(N, 4)).astype("f4")
Y = (np.arange(N) % 3).astype("i8")


def model():
    return torch.nn.Linear(4, 3)


def model_that_copes():
    class Filled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.nan_to_num())

    return Filled(4, 3)


@pytest.fixture
def holes(tmp_path):
    x = X.copy()
    x[BAD[0], 1], x[BAD[1], 2] = np.nan, np.inf
    write_dataset(tmp_path / "d", "train", {"x": x, "y": Y}, inputs="x", target="y", chunk_size=8)
    return Dataset(tmp_path / "d")


def request(data, tmp_path, build=model, **settings):
    return prepare(RunRequest(model=build, data=data, run_dir=tmp_path / "run", learning=Learning(steps=5), **settings))


class TestScan:
    def test_a_run_is_refused_with_the_row(self, holes, tmp_path):
        with pytest.raises(DataError, match=r"'x': 2 rows of .* the first is row 3, .*missing=….*skip_bad_chunks=True"):
            request(holes, tmp_path)

    def test_a_run_that_skips_is_told_how_many(self, holes, tmp_path, caplog):
        request(holes, tmp_path, scoring=Scoring(skip_bad_chunks=True))
        assert "2 rows" in caplog.text
        assert "they are left out" in caplog.text

    def test_a_model_that_copes_is_left_alone(self, holes, tmp_path, caplog):
        request(holes, tmp_path, model_that_copes)
        assert "rows" not in caplog.text

    def test_validation_data_are_scanned_too(self, holes, tmp_path):
        write_dataset(tmp_path / "e", "train", {"x": X, "y": Y}, inputs="x", target="y", chunk_size=8)
        with pytest.raises(DataError, match="the first is row 3"):
            request(Dataset(tmp_path / "e"), tmp_path, validation=holes)

    def test_what_ingest_has_checked_is_not_read(self, tmp_path, monkeypatch):
        url = ingest((X, Y), tmp_path / "e")
        monkeypatch.setattr(finite, "find_missing", lambda _: pytest.fail("read"))
        request(Dataset(url), tmp_path)

    def test_of_large_data_a_part_is_scanned(self, holes, monkeypatch):
        monkeypatch.setattr(finite, "_SCANNED_BYTES", 4 * 4 * 8 * 2)  # two of eight chunks: the first and the last
        found = find_missing(holes)
        assert (found.share, found.count, found.rows) == (0.25, 1, [3])


class TestRowsWithMissingValues:
    ROWS = Rows((np.array([[1.0, 2], [np.nan, 4], [5, np.inf]]), np.array([7, 8, 9])), np.array([1.0, 2.0, np.nan]))

    def test_they_are_found_and_replaced(self):
        bad = incomplete(self.ROWS)
        assert bad.tolist() == [False, True, True]
        made = replaced(self.ROWS, bad)
        assert made.inputs[0].tolist() == [[1, 2]] * 3
        assert made.inputs[1].tolist() == [7, 7, 7]
        assert made.target.tolist() == [1, 1, 1]
        assert np.isnan(self.ROWS.inputs[0][1, 0])
        assert complete_only(self.ROWS).inputs[1].tolist() == [7]
        assert replaced(self.ROWS, np.ones(3, bool)).inputs[0].tolist() == [[0, 0]] * 3

    def test_they_contribute_nothing_to_a_step(self, holes):
        """A pass over all rows moves the parameters as if the loss of the incomplete ones were zero."""
        sampling = Sampling(uniform=True)
        draws = BatchSampler(N, 8, N, sampling, seed=0, report_every=100, skip_bad_chunks=True)
        settings = Learning(steps=1, batch_size=N, learning_rate=0.5, momentum=0.0)
        feed = open_feed(holes, draws, Prepare(holes, torch.device("cpu")), settings, timeout=30, skip_incomplete=True)
        torch.manual_seed(0)
        trainer, other = Trainer(model(), torch.nn.CrossEntropyLoss(reduction="none"), settings), model()
        other.load_state_dict(trainer.model.state_dict())
        batch = feed(0, 1)
        step = trainer.step(0, batch.inputs, batch.targets, batch.draw.coefficients, norms=True, measure=True)
        good = [i for i in range(N) if i not in BAD]
        losses = torch.nn.functional.cross_entropy(other(torch.from_numpy(X[good])), torch.from_numpy(Y[good]))
        (losses * (len(good) / N)).backward()
        for parameter, wanted in zip(trainer.model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter, wanted - 0.5 * wanted.grad)
        assert np.flatnonzero(step.norms == 0).tolist() == np.flatnonzero(np.isin(batch.draw.indices, BAD)).tolist()
        assert np.isfinite([step.loss, step.mean_gradient_sq_norm, *step.norms]).all()

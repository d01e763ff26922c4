"""Lightning trains importance-sampled on real data, and to the same bits as by itself if coefficients are 1."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gloo import in_processes
from torch.utils.data import DataLoader, TensorDataset

import dask_isgd as isgd
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import ConfigError
from dask_isgd.loop import WeightedIndex

L = pytest.importorskip("lightning", reason="extra 'lightning'; CI tests it in an environment of its own")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice, and its own deprecations
]


@pytest.fixture(scope="module")
def rows(digits) -> TensorDataset:
    found = digits.read(0, len(digits))
    x = torch.from_numpy(found.inputs[0].astype("f4")).flatten(1) / 16.0
    return TensorDataset(x, torch.from_numpy(found.target.astype("i8")))


class Model(L.LightningModule):
    def __init__(self, features: int, loader=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(features, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        self.loader = loader

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if len(batch) == 2:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        _, coefficient, (x, y) = batch
        return isgd.weighted_mean(torch.nn.functional.cross_entropy(self(x), y, reduction="none"), coefficient)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def trainer(*callbacks, **settings):
    defaults = {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 10}
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**defaults, **settings},
    )


def error(model, rows) -> float:
    x, y = rows.tensors
    with torch.no_grad():
        return float((model(x).argmax(1) != y).float().mean())


def test_it_trains_to_the_accuracy_of_its_uniform_twin(rows):
    found = {}
    for name, sampling in {"open": isgd.Sampling(gate="open"), "uniform": isgd.Sampling(uniform=True)}.items():
        importance = isgd.lightning.ImportanceSampling(sampling=sampling)
        model = Model(rows.tensors[0].shape[1])
        trainer(importance, max_epochs=8).fit(model, importance.loader(rows, 32))
        found[name] = error(model, rows)
        assert importance.sampler.report()["scored_fraction"] > 0.5 or name == "uniform"
        if name == "open":
            assert importance.sampler.gain > 1.2
    assert found["open"] < 0.02
    assert found["uniform"] < 0.05


class Given(isgd.ImportanceBatchSampler):
    """The framework's own minibatches, with coefficients 1."""

    def __iter__(self):
        for batch in self.batches:
            yield [WeightedIndex(row, 1.0) for row in batch]


def test_with_coefficients_of_one_it_is_lightning_to_the_bit(rows, monkeypatch):
    plain, ours = (Model(rows.tensors[0].shape[1]) for _ in range(2))
    torch.manual_seed(1)
    loader = DataLoader(rows, batch_size=32, shuffle=True, drop_last=True)
    trainer(max_epochs=2, accumulate_grad_batches=2).fit(plain, loader)
    torch.manual_seed(1)
    importance = isgd.lightning.ImportanceSampling()
    own = importance.loader(rows, 32)
    monkeypatch.setattr(importance.sampler, "__class__", Given)
    monkeypatch.setattr(Given, "__len__", lambda self: len(self.batches))
    monkeypatch.setattr(Given, "update", lambda self, index, scores: seen.append(scores))
    importance.sampler.batches, seen = loader.batch_sampler, []
    trainer(importance, max_epochs=2, accumulate_grad_batches=2).fit(ours, own)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert len(seen) == 2 * len(loader)
    assert all(norms is not None for norms in seen)


def test_its_state_is_part_of_lightnings_checkpoint(rows, tmp_path):
    importance = isgd.lightning.ImportanceSampling(sampling=isgd.Sampling(gate="open"))
    training = trainer(importance)
    training.fit(Model(rows.tensors[0].shape[1]), importance.loader(rows, 32))
    training.save_checkpoint(tmp_path / "checkpoint")
    resumed = isgd.lightning.ImportanceSampling(sampling=isgd.Sampling(gate="open"))
    again = Model(rows.tensors[0].shape[1])
    trainer(resumed, max_epochs=2).fit(again, resumed.loader(rows, 32), ckpt_path=tmp_path / "checkpoint")
    state = importance.sampler.state_dict()
    assert resumed.sampler.state_dict()["next"] == 2 * state["next"]


def test_a_sampler_that_lightning_does_not_use_is_an_error(rows):
    importance = isgd.lightning.ImportanceSampling()
    with pytest.raises(ConfigError, match="use_distributed_sampler=False"):
        trainer(importance).fit(Model(rows.tensors[0].shape[1]), DataLoader(rows, batch_size=8))


def test_two_processes_share_each_minibatch(rows, tmp_path):
    """With DDP: the same model and weights in both, other rows of each minibatch, and it learns."""

    def train(rank: int) -> None:
        sampling = isgd.Sampling(gate="open")
        importance = isgd.lightning.ImportanceSampling(sampling=sampling, module=lambda model: model.net)
        seen: list[list[int]] = []

        class Loaded(Model):
            def train_dataloader(self):
                loader = importance.loader(rows, 16)
                update = importance.sampler.update

                def recorded(index, norms=None):
                    if len(seen) % 50 == 0:
                        x, y = (part[index] for part in rows.tensors)
                        truth = isgd.gradient_norms(self.net, cross_entropy, x, y)
                        assert torch.allclose(norms, truth, rtol=1e-3)
                    seen.append(index.tolist())
                    update(index, norms)

                importance.sampler.update = recorded
                return loader

        model = Loaded(rows.tensors[0].shape[1])
        trainer(importance, max_epochs=3, strategy="ddp", devices=2, use_distributed_sampler=False).fit(model)
        state = importance.sampler.state_dict()["sampler"]["sampler"]["weights"]
        found = {"model": model.net.state_dict(), "weights": state, "seen": seen, "gain": importance.sampler.gain}
        torch.save({**found, "error": error(model, rows)}, tmp_path / str(rank))

    in_processes(train, tmp_path)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert torch.equal(first["weights"].nan_to_num(-1), second["weights"].nan_to_num(-1))
    assert first["seen"] != second["seen"]
    assert len(first["seen"]) == 3 * -(-len(rows) // 32)
    assert first["gain"] > 1
    assert first["error"] < 0.2


def test_several_processes_need_a_loader_that_they_made_and_a_module_to_capture(rows):
    importance = isgd.lightning.ImportanceSampling()
    loader = importance.loader(rows, 16)
    with pytest.raises(ConfigError, match="2 processes train, and the loader was made for 1"):
        importance.on_train_start(SimpleNamespace(train_dataloader=loader, world_size=2), Model(64))
    importance.sampler._shares.count = 2
    with pytest.raises(ConfigError, match="2 processes train, and module is not given"):
        importance.on_train_start(SimpleNamespace(train_dataloader=loader, world_size=2), Model(64))

"""Hugging Face's Trainer trains importance-sampled on real data, and to the same bits if coefficients are 1."""

from __future__ import annotations

import pytest
import torch
from gloo import in_processes

import dask_isgd as isgd
from dask_isgd.errors import ConfigError
from dask_isgd.loop import WeightedIndex

transformers = pytest.importorskip(
    "transformers", reason="extra 'transformers'; CI tests it in an environment of its own"
)
pytest.importorskip("accelerate", reason="Trainer needs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's advice, and its own deprecations


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, k):
        return {"x": self.x[k], "labels": self.y[k]}


@pytest.fixture(scope="module")
def rows(digits) -> Rows:
    found = digits.read(0, len(digits))
    x = torch.from_numpy(found.inputs[0].astype("f4")).flatten(1) / 16.0
    return Rows(x, torch.from_numpy(found.target.astype("i8")))


class Model(torch.nn.Module):
    def __init__(self, features: int):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(features, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x, labels=None):
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Importance(isgd.huggingface.ImportanceSampling, transformers.Trainer):
    sampling = isgd.Sampling(gate="open")


class Uniform(isgd.huggingface.ImportanceSampling, transformers.Trainer):
    sampling = isgd.Sampling(uniform=True)


def train(kind, rows, folder, resume=None, **settings):
    defaults = {"per_device_train_batch_size": 32, "learning_rate": 0.2, "optim": "sgd", "num_train_epochs": 1}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **defaults, **settings},
    )
    trainer = kind(model=Model(rows.x.shape[1]), args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def error(trainer, rows) -> float:
    with torch.no_grad():
        return float((trainer.model(rows.x)["logits"].argmax(1) != rows.y).float().mean())


def test_it_trains_to_the_accuracy_of_its_uniform_twin(rows, tmp_path):
    ours, twin = (train(kind, rows, tmp_path, num_train_epochs=12, learning_rate=1.0) for kind in (Importance, Uniform))
    assert ours.sampler.gain > 1.2
    assert error(ours, rows) < 0.02
    assert error(twin, rows) < 0.05


@pytest.mark.parametrize("accumulated", [1, 3])
def test_with_coefficients_of_one_it_is_trainer_to_the_bit(rows, tmp_path, accumulated):
    batches, settings = [], {"gradient_accumulation_steps": accumulated, "dataloader_drop_last": True}

    class Recorded(transformers.Trainer):
        def training_step(self, model, inputs, *rest):
            batches.append([int((rows.x == x).all(1).nonzero()[0]) for x in inputs["x"]])
            return super().training_step(model, inputs, *rest)

    class Given(isgd.ImportanceBatchSampler):
        def __len__(self):
            return len(batches)

        def __iter__(self):
            return iter([[WeightedIndex(row, 1.0) for row in batch] for batch in batches])

        def update(self, index, scores=None):
            assert scores is not None

    class Same(Importance):
        def _get_train_sampler(self, train_dataset=None):
            return Given(len(rows), 32)

    plain = train(Recorded, rows, tmp_path, **settings)
    ours = train(Same, rows, tmp_path, **settings)
    assert ours.state.global_step == plain.state.global_step
    pairs = zip(plain.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(rows, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 20, "num_train_epochs": 2}
    whole = train(Importance, rows, tmp_path / "whole", **settings)
    resumed = train(Importance, rows, tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-20"), **settings)
    assert resumed.state.global_step == whole.state.global_step
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_would_be_silently_wrong_is_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match="got group_by_length"):
        train(Importance, rows, tmp_path, train_sampling_strategy="group_by_length")
    tokens = Rows(rows.x, rows.y[:, None].expand(-1, 3))
    with pytest.raises(ConfigError, match="override example_losses, which returns one loss per example"):
        train(Importance, tokens, tmp_path)


def test_two_processes_share_each_minibatch(rows, tmp_path):
    """With DDP: the same model and weights in both, other rows of each minibatch, and it learns."""

    def training(rank: int) -> None:
        seen: list[list[int]] = []

        class Recorded(Importance):
            def training_step(self, model, inputs, *rest):
                seen.append(inputs["isgd_index"].tolist())
                return super().training_step(model, inputs, *rest)

        settings = {"per_device_train_batch_size": 16, "num_train_epochs": 4, "ddp_backend": "gloo"}
        ours = train(Recorded, rows, tmp_path / "out", learning_rate=1.0, **settings)
        state = ours.sampler.state_dict()["sampler"]["sampler"]["weights"]
        found = {"model": ours.model.state_dict(), "weights": state, "seen": seen, "gain": ours.sampler.gain}
        torch.save({**found, "error": error(ours, rows)}, tmp_path / str(rank))

    in_processes(training, tmp_path)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert torch.equal(first["weights"].nan_to_num(-1), second["weights"].nan_to_num(-1))
    assert first["seen"] != second["seen"]
    assert len(first["seen"]) == 4 * -(-len(rows) // 32)
    assert first["gain"] > 1
    assert first["error"] < 0.2

"""Recipes, pipelines and models: what a name or a YAML file stands for."""

import os
import subprocess
import sys

import pytest
import torch

import dask_isgd.pipelines.models as zoo
from dask_isgd.core import models
from dask_isgd.errors import ConfigError
from dask_isgd.names import named
from dask_isgd.pipelines import PIPELINES, load_recipe
from dask_isgd.pipelines.recipes import recipe_from_mapping

DEFAULTS = {name: pipeline.recipe for name, pipeline in PIPELINES.items()}


class TestPipelines:
    @pytest.mark.parametrize(
        ("name", "shape"), [("digits", (8, 8)), ("fashion-mnist", (28, 28)), ("svhn", (3, 32, 32))]
    )
    def test_model_takes_the_data(self, name, shape):
        pipeline = PIPELINES[name]
        assert pipeline.recipe.data == pipeline.name == name
        assert pipeline.model()(torch.zeros(5, *shape)).shape == (5, 10)
        assert type(models.build(pipeline.recipe.model)) is type(pipeline.model())

    def test_are_read_only(self):
        with pytest.raises(TypeError):
            PIPELINES["digits"] = None

    def test_the_list_costs_no_torch(self):
        heavy = "[m for m in ('torch', 'zarr', 'distributed', 'matplotlib') if m in sys.modules]"
        code = f"import sys, dask_isgd.pipelines.cli; print({heavy})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
        assert done.stdout.strip() == "[]", done.stderr


class TestModels:
    def test_the_papers_network(self):
        torch.manual_seed(0)
        model = zoo.svhn()
        linear = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
        assert [layer.in_features for layer in linear] == [3072, 2048, 2048, 2048, 2048]
        assert sum(p.numel() for p in model.parameters()) == 3072 * 2048 + 3 * 2048**2 + 2048 * 10 + 4 * 2048 + 10
        assert all(abs(float(layer.weight.detach().std()) - 0.01) < 2e-4 for layer in linear)
        assert all(float(layer.bias.detach().abs().max()) == 0 for layer in linear)

    def test_normalise_is_neither_trained_nor_saved(self):
        first = zoo.Normalise(mean=[1.0, 2.0], std=[2.0, 4.0])
        model = zoo.mlp([2, 3, 2], first=first)
        assert first(torch.tensor([[3, 6]], dtype=torch.uint8)).tolist() == [[1.0, 1.0]]
        assert list(first.parameters()) == []
        assert not any("mean" in name for name in model.state_dict())

    @pytest.mark.parametrize("sizes", [[], [3], [3, 0]])
    def test_bad_sizes(self, sizes):
        with pytest.raises(ValueError, match="wanted two or more positive"):
            zoo.mlp(sizes)

    def test_no_deviation(self):
        with pytest.raises(ValueError, match="wanted all values above 0"):
            zoo.Normalise(0.0, [1.0, 0.0])


class TestRecipes:
    def test_everything(self, tmp_path):
        file = tmp_path / "r.yaml"
        file.write_text(
            "data: my.zarr\n"
            "model: torch.nn:Identity\n"
            "loss: torch.nn.functional:mse_loss\n"
            "validation: held-out\n"
            "learning: {steps: 5, batch-size: 7, optimizer: 'torch.optim:Adam'}\n"
            "scoring: {method: loss}\n"
            "sampling:\n  gate: open\n  smoothing: 1.5\n"
        )
        recipe = load_recipe(file)
        assert (recipe.data, recipe.model, recipe.validation) == ("my.zarr", "torch.nn:Identity", "held-out")
        assert (recipe.learning.steps, recipe.learning.batch_size) == (5, 7)
        assert recipe.learning.optimizer is torch.optim.Adam
        assert (recipe.scoring.method, recipe.sampling.gate, recipe.sampling.smoothing) == ("loss", "open", 1.5)
        assert named(recipe.loss) is torch.nn.functional.mse_loss

    def test_a_pipelines_data_brings_its_defaults(self):
        recipe = recipe_from_mapping({"data": "digits", "learning": {"steps": 3}}, DEFAULTS)
        assert recipe.learning.steps == 3
        assert recipe.learning.batch_size == DEFAULTS["digits"].learning.batch_size
        assert (recipe.model, recipe.sampling) == (DEFAULTS["digits"].model, DEFAULTS["digits"].sampling)
        assert recipe_from_mapping({"data": "digits", "validation": None}, DEFAULTS).validation is None

    def test_every_mistake_at_once(self):
        with pytest.raises(ConfigError) as caught:
            recipe_from_mapping(
                {
                    "dta": "x",
                    "model": 3,
                    "learning": {"steps": -1, "momentum": 2},
                    "scoring": {"metod": "loss"},
                    "sampling": [1],
                }
            )
        message = str(caught.value)
        for part in (
            "unknown key 'dta'; did you mean 'data'?",
            "Recipe.data: got nothing, wanted the name of a pipeline, a path or a URL",
            "Recipe.model: got 3",
            "Learning.steps: got -1",
            "Learning.momentum: got 2, wanted a number at least 0 and at most 1",
            "Scoring: unknown key 'metod'; did you mean 'method'?",
            "Sampling: got [1], wanted a mapping",
        ):
            assert part in message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a: [1", "is not YAML"),
            ("- a\n- b\n", "got list, wanted a mapping"),
            ("", "got NoneType, wanted a mapping"),
            ("data: x\nmodel: m:n\n", "Learning.steps: got nothing"),
            ("data: x\nmodel: m:n\nlearning: {steps: 1, optimizer: 'torch.optim:Adm'}\n", "Learning.optimizer: got"),
            ("data: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, content, message):
        file = tmp_path / "r.yaml"
        file.write_text(content)
        with pytest.raises(ConfigError, match=message) as caught:
            load_recipe(file)
        assert str(file) in str(caught.value)

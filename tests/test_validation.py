"""One validation for settings and files: what is accepted, and how mistakes are worded."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import dask_isgd as isgd
from dask_isgd.clusters import load_cluster
from dask_isgd.errors import ConfigError
from dask_isgd.field_types import Bytes, Count, Fits, Flag, Function
from dask_isgd.names import hint, hyphenated, named, nearest
from dask_isgd.pipelines import load_recipe
from dask_isgd.pipelines.ingestion.recipe import ingest_recipe
from dask_isgd.validation import Places, sentences, validate, wanted
from dask_isgd.yaml_file import read_yaml


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n_rows: Count = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    share: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    kind: Literal["red", "green"] = "red"
    inner: Inner | None = None
    size: Bytes = 1
    on_off: Flag = True
    call: Function | None = None
    mixed: int | str = 0
    pairs: Annotated[list[int], Fits(lambda v: len(v) == 2, "two numbers")] = [1, 2]


SCHEMA = TypeAdapter(Outer).json_schema()


class TestSentences:
    @pytest.mark.parametrize(
        ("error", "sentence"),
        [
            (("missing", ("share",), {}), "Outer.share: got nothing, wanted a number above 0 and at most 1 or None"),
            (("less_than_equal", ("share",), 3), "Outer.share: got 3, wanted a number above 0 and at most 1 or None"),
            (("extra_forbidden", ("shar",), 1), "Outer: unknown key 'shar'; did you mean 'share'?"),
            (("extra_forbidden", ("inner", "n_row"), 1), "Outer.inner: unknown key 'n_row'; did you mean 'n_rows'?"),
            (("extra_forbidden", ("inner", "zz"), 1), "Outer.inner: unknown key 'zz'; known: n_rows"),
            (("literal_error", ("kind",), "gren"), "Outer.kind: got 'gren', wanted one of 'red', 'green'; did you mean 'green'?"),  # noqa: E501
            (("literal_error", ("kind",), 7), "Outer.kind: got 7, wanted one of 'red', 'green'"),
            (("int_type", ("inner", "n_rows"), "1"), "Outer.inner.n_rows: got '1', wanted a whole number at least 1"),
            (("model_type", ("inner",), [1]), "Outer.inner: got [1], wanted a mapping of settings"),
            (("int_parsing", ("mixed", "int"), []), "Outer.mixed: got [], wanted a whole number or a string"),
            (("list_type", ("pairs", 0), None), "Outer.pairs: got None, wanted two numbers"),
            (("bool_type", ("on_off",), 1), "Outer.on_off: got 1, wanted True or False"),
            (("unexpected_positional_argument", (0,), 3), "Outer: got 3 without a name, wanted each setting by name"),
        ],
        ids=lambda value: str(value[:2]) if isinstance(value, tuple) else "",
    )  # fmt: skip
    def test_each_kind_of_error(self, error, sentence):
        kind, place, value = error
        error = {"type": kind, "loc": place, "msg": "", "input": value}
        assert sentences([error], SCHEMA, Places("Outer")) == [sentence]

    def test_a_config_error_keeps_its_words(self):
        context = {"error": ConfigError("no such x")}
        error: Any = {"type": "value_error", "loc": ("call",), "msg": "", "input": "x", "ctx": context}
        assert sentences([error], SCHEMA, Places()) == ["call: no such x"]

    def test_branches_of_a_union_are_one_mistake(self):
        errors: Any = [{"type": "t", "loc": ("mixed", branch), "msg": "", "input": []} for branch in ("int", "str")]
        assert sentences(errors, SCHEMA, Places()) == ["mixed: got [], wanted a whole number or a string"]

    @pytest.mark.parametrize(
        ("places", "path", "name"),
        [
            (Places(), (), ""),
            (Places(), ("a_b", "c"), "a_b.c"),
            (Places("Recipe"), (), "Recipe"),
            (Places("Recipe", {"learning": "Learning"}), ("learning", "steps"), "Learning.steps"),
            (Places("Recipe", {"learning": "Learning"}), ("data",), "Recipe.data"),
            (Places(spell=hyphenated), ("job", "worker_extra_args"), "job.worker-extra-args"),
        ],
    )
    def test_places(self, places, path, name):
        assert places.name(path) == name

    def test_every_mistake_at_once_and_none_in_pydantics_words(self):
        values = {"share": True, "kind": "blue", "inner": {"n_rows": 1.0, "x": 1}, "size": True, "call": "os:nothing"}
        with pytest.raises(ConfigError) as caught:
            validate(Outer, values, Places("Outer"), also=["Zoo: closed"])
        assert str(caught.value).splitlines() == [
            "Outer.call: got 'os:nothing', wanted an importable 'package.module:name' (module 'os' has no attribute "
            "'nothing'); check the spelling and that the package is installed",
            "Outer.inner.n_rows: got 1.0, wanted a whole number at least 1",
            "Outer.inner: unknown key 'x'; known: n_rows",
            "Outer.kind: got 'blue', wanted one of 'red', 'green'",
            "Outer.share: got True, wanted a number above 0 and at most 1 or None",
            "Outer.size: got True, wanted a number of bytes or a string such as '2GB'",
            "Zoo: closed",
        ]
        assert caught.value.__cause__ is None

    def test_a_part_without_a_type_is_a_mapping(self):
        assert wanted({}) == "a mapping of settings"


class TestSettings:
    @pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(isgd.Learning)])
    def test_every_setting_of_the_learner_is_checked(self, name):
        with pytest.raises(ConfigError, match=rf"^Learning\.{name}: got \[None\], wanted [^\n]*$"):
            isgd.Learning(**{"steps": 1, name: [None]})

    @pytest.mark.parametrize("kind", [isgd.Scoring, isgd.Sampling])
    def test_every_setting_of_scorers_and_sampler_is_checked(self, kind):
        for field in dataclasses.fields(kind):
            with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{field.name}: got \[None\], wanted [^\n]*$"):
                kind(**{field.name: [None]})

    @pytest.mark.parametrize(
        ("kind", "values"),
        [
            (isgd.Learning, {"steps": True}),
            (isgd.Learning, {"steps": "3"}),
            (isgd.Learning, {"steps": 3.0}),
            (isgd.Learning, {"steps": 1, "learning_rate": True}),
            (isgd.Learning, {"steps": 1, "learning_rate": "0.1"}),
            (isgd.Learning, {"steps": 1, "learning_rate": float("nan")}),
            (isgd.Learning, {"steps": 1, "clip_norm": 0}),
            (isgd.Learning, {"steps": 1, "cache_disk": -1}),
            (isgd.Learning, {"steps": 1, "cache_memory": True}),
            (isgd.Learning, {"steps": 1, "device": b"cpu"}),
            (isgd.Learning, {"steps": 1, "synchronous": 1}),
            (isgd.Scoring, {"timeout": True}),
            (isgd.Scoring, {"timeout": "soon"}),
            (isgd.Scoring, {"resources": {"scorer": True}}),
            (isgd.Scoring, {"resources": {1: 1}}),
            (isgd.Sampling, {"max_coefficient": 1}),
            (isgd.Sampling, {"ema_decay": 1}),
        ],
    )
    def test_what_is_refused(self, kind, values):
        with pytest.raises(ConfigError, match="wanted"):
            kind(**values)

    def test_no_steps(self):
        with pytest.raises(ConfigError, match=r"^Learning.steps: got nothing, wanted a whole number at least 1$"):
            isgd.Learning()

    def test_a_callable_may_be_given_by_name(self):
        assert isgd.Learning(steps=1, optimizer="json:loads", transform=len).optimizer is named("json:loads")

    def test_they_are_values(self):
        one = isgd.Learning(steps=3, optimizer=len, clip_norm=2)
        assert one == isgd.Learning(steps=3, optimizer=len, clip_norm=2.0) == pickle.loads(pickle.dumps(one))  # noqa: S301
        assert one == copy.deepcopy(one)
        assert one != dataclasses.replace(one, steps=4)
        assert hash(one) == hash(dataclasses.replace(one))
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.steps = 4
        assert list(inspect.signature(isgd.Learning).parameters) == [f.name for f in dataclasses.fields(one)]
        with pytest.raises(ConfigError, match="steps: got 0"):
            dataclasses.replace(one, steps=0)
        resources = {"scorer": 1}
        assert isgd.Scoring(resources=resources).resources is resources


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: &a [1, *a]", "an alias contains itself"),
            ("dask: &d {x: {y: *d}}", "an alias contains itself"),
            ("? &k [*k]\n: 1", "is not YAML"),
            ("[" * 5000, "nested too deeply|is not YAML"),
            ("[" * 600 + "]" * 600, "nested too deeply"),
            ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(12)), "more than"),
            ("when: 2020-13-45", "is not YAML"),
            ("a: !!python/name:os.system", "is not YAML"),
            ("a: \x00", "is not YAML"),
        ],
        ids=["list", "mapping", "key", "open", "deep", "laughs", "date", "python", "zero"],
    )  # fmt: skip
    @pytest.mark.timeout(30)
    def test_what_is_refused(self, tmp_path, text, message):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            read_yaml(tmp_path / "r.yaml", "a recipe")
        assert "r.yaml" in str(caught.value)

    @pytest.mark.parametrize("read", [load_recipe, load_cluster, ingest_recipe])
    @pytest.mark.timeout(30)
    def test_every_file_is_read_with_this_care(self, tmp_path, read):
        (tmp_path / "r.yaml").write_text("source: &a {numpy: *a}\ndata: *a\ncluster: local\ndask: *a")
        with pytest.raises(ConfigError, match=r"r\.yaml: an alias contains itself"):
            read(tmp_path / "r.yaml")

    def test_an_alias_used_twice_is_fine(self, tmp_path):
        (tmp_path / "r.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}")
        assert read_yaml(tmp_path / "r.yaml", "a recipe") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(ConfigError, match=r"cannot be read .*; wanted a recipe in YAML"):
            read_yaml(tmp_path / "r.yaml", "a recipe")


class TestNames:
    def test_the_nearest(self):
        assert nearest("quue", {"queue": 1, "memory": 2}) == "queue"
        assert nearest("zzz", ["queue"]) is None
        assert hint("quue", ["queue"], lambda name: f"job.{name}") == "did you mean job.queue?"
        assert hint("zzz", ["queue", "cores"]) == "known: queue, cores"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nowhere.at.all:x", "wanted an importable"),
            ("json:nothing", "wanted an importable"),
            ("json", "wanted an importable"),
            (":x", "wanted an importable"),
            ("math:pi", "wanted the name of a callable; this is of type float"),
        ],
    )
    def test_a_name_of_nothing(self, name, message):
        with pytest.raises(ConfigError, match=message):
            named(name)

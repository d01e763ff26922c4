"""Exact norms on the peers' own test cases: torch's module database, the layer tests of Opacus, BackPACK's settings.

Each case is compared with the definition, autograd in float64, one example at a time, and is exact, refused
(ModelError: no example has a gradient of its own) or wrong. Cases without a parameter or without a batch are not
counted. To run it::

    pip install opacus hypothesis expecttest backpack-for-pytorch pytest
    git clone https://github.com/f-dangel/backpack
    python benchmarks/norms_suites.py [--only torch opacus] [--backpack backpack] [--json counts.json] [--verbose]
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import pkgutil
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from norms_families import importable_torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils._pytree import tree_leaves, tree_map

from dask_isgd.errors import ModelError
from dask_isgd.norms import NormEngine

Case = tuple[str, nn.Module, tuple[Any, ...], int]
"""A name, a module, its inputs, and the dimension of the batch."""

RTOL = 1e-3
"""Relative: layers of the suites are drawn at random, and some of them are poorly conditioned in float32."""


class Wrapped(nn.Module):
    """A layer of which the batch is in some dimension of inputs and outputs, as a model with the batch first.

    The states of recurrent layers have it second in any case.
    """

    def __init__(self, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.layer, self.dim = layer, dim
        self.recurrent = isinstance(layer, nn.RNNBase)

    def given(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the layer's inputs as the model takes them."""
        x, *more = inputs
        return moved(x, self.dim, 0), *moved(tuple(more), 1 if self.recurrent else self.dim, 0)

    def forward(self, x: Any, *more: Any) -> Any:
        output = self.layer(moved(x, 0, self.dim), *moved(more, 0, 1 if self.recurrent else self.dim))
        if self.recurrent:
            return moved(output[0], self.dim, 0), moved(output[1], 1, 0)
        return moved(output, self.dim, 0)


def moved(values: Any, source: int, to: int) -> Any:
    """Return tensors with one of their dimensions moved, and contiguous."""
    return tree_map(lambda t: t.movedim(source, to).contiguous() if isinstance(t, Tensor) and t.ndim > 1 else t, values)


class Unpacked(nn.Module):
    """A layer of packed sequences, as a model of padded ones and their lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, padded: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed), batch_first=True, total_length=padded.shape[1])[0]


class Bags(nn.Module):
    """A layer of bags that follow each other, as a model of padded bags and their lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @staticmethod
    def given(tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return padded bags (B, T) and their lengths (B,)."""
        bags = tokens.tensor_split(offsets[1:].tolist())
        return pad_sequence(list(bags), batch_first=True), torch.tensor([len(bag) for bag in bags])

    def forward(self, padded: Tensor, lengths: Tensor) -> Tensor:
        tokens = torch.cat([bag[:length] for bag, length in zip(padded, lengths.tolist(), strict=True)])
        return self.layer(tokens, lengths.cumsum(0) - lengths)


def row_loss(output: Any, target: Tensor) -> Tensor:
    """Return a loss that depends on every number of its example's outputs, and not linearly."""
    parts = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    rows = [part.reshape(len(target), -1) for part in parts if part.ndim and part.shape[0] == len(target)]
    return torch.stack([(row * torch.linspace(0.5, 1.5, row.shape[1]) + 0.1 * row**2).sum(1) for row in rows]).sum(0)


def definition(model: nn.Module, inputs: tuple[Any, ...], size: int) -> Tensor:
    """Return the norms by autograd in float64, one example at a time."""
    model = copy.deepcopy(model).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = []
    for n in range(size):
        row = tree_map(lambda t, n=n: _double(t[n : n + 1]) if isinstance(t, Tensor) else t, inputs)
        gradients = torch.autograd.grad(row_loss(model(*row), torch.zeros(1))[0], parameters, allow_unused=True)
        norms.append(sum((g.to_dense().square().sum() for g in gradients if g is not None), torch.zeros(())).sqrt())
    return torch.stack(norms).double()


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def judged(module: nn.Module, inputs: tuple[Any, ...], dim: int) -> tuple[str, str]:
    """Return "exact", "refused", "wrong" or "not counted", and details."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors or not any(parameter.requires_grad for parameter in module.parameters()):
        return "not counted", "no parameter"
    model = Wrapped(copy.deepcopy(module), dim).eval()
    try:
        inputs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, model.given(inputs))
    except IndexError as error:
        return "not counted", f"not a batch of examples: {error}"
    lengths = {len(t) if t.ndim else None for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    size = lengths.pop()
    if lengths or size is None:
        return "not counted", "not a batch of examples: its tensors have several lengths, or none"
    try:
        wanted = definition(model, inputs, size) if size else torch.zeros(0)
    except Exception as error:
        return "not counted", f"not a batch of examples: {type(error).__name__}: {error}"
    target = torch.zeros(size)
    try:
        norms, _ = NormEngine(model, row_loss)(inputs, target)
    except ModelError as error:
        return "refused", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    error = (norms.double() - wanted).abs()
    floor = 1e-5 * wanted.max() + 1e-12 if size else 0.0
    if norms.shape == wanted.shape and bool((error <= RTOL * wanted + floor).all()):
        return "exact", ""
    return "wrong", f"got {norms.tolist()[:4]}, wanted {wanted.tolist()[:4]}"


def torch_cases() -> Iterator[Case]:
    """Yield the cases of torch's module database."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": False}
        for number, case in enumerate(info.module_inputs_func(info, **options)):
            torch.manual_seed(0)
            made, given = case.constructor_input, case.forward_input
            if given is None or given.kwargs:
                continue
            try:
                module = info.module_cls(*made.args, **made.kwargs)
                module(*given.args)  # lazy layers become others
            except Exception:
                continue
            if isinstance(module, nn.RNNBase) and given.args[0].ndim == 2:  # one sequence, without a batch
                continue
            second = any(getattr(part, "batch_first", True) is False for part in module.modules())
            yield f"{info.name} {number}", module, tuple(given.args), int(second)


def opacus_cases() -> Iterator[Case]:
    """Yield the cases of Opacus' tests of layers, with the random settings that they draw."""
    import opacus.tests.grad_samples as package
    from opacus.tests.grad_samples.common import GradSampleHooks_test

    found: list[Case] = []

    def record(test: unittest.TestCase, x: Any, module: nn.Module, batch_first: bool = True, **_: Any) -> None:
        name = test.id().rpartition("grad_samples.")[2]
        if isinstance(x, PackedSequence):
            found.append((f"{name}, packed", Unpacked(module), pad_packed_sequence(x, batch_first=True), 0))
        elif isinstance(module, nn.EmbeddingBag):
            found.append((f"{name}, bags", Bags(module), Bags.given(*x), 0))
        else:
            found.append((name, module, (x,), int(not batch_first)))

    with mock.patch.object(GradSampleHooks_test, "run_test", record):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_test"):
                loaded = importlib.import_module(f"{package.__name__}.{module.name}")
                suite = unittest.defaultTestLoader.loadTestsFromModule(loaded)
                suite.run(unittest.TestResult())
                yield from found
                found.clear()


def backpack_cases(checkout: Path) -> Iterator[Case]:
    """Yield the settings of all tests of BackPACK, from a checkout of its repository."""
    sys.path.insert(0, str(checkout))
    importable_torchvision()
    sys.modules.pop("test", None)  # Python's own
    sys.modules.setdefault("pytorch_memlab", mock.MagicMock())  # all its tests import it, no setting uses it
    seen = set()
    for path in sorted((checkout / "test").rglob("*settings*.py")):
        try:
            module = importlib.import_module(".".join(path.relative_to(checkout).with_suffix("").parts))
        except ImportError as error:
            print(f"backpack: {path.stem}: not imported: {error}")
            continue
        lists = [value for value in vars(module).values() if isinstance(value, list)]
        for setting in (item for items in lists for item in items if isinstance(item, dict)):
            if id(setting) in seen or not {"module_fn", "input_fn"} <= setting.keys():
                continue
            seen.add(id(setting))
            torch.manual_seed(setting.get("seed", 0))
            try:
                inputs = setting["input_fn"]()
                made = setting["module_fn"]()
            except Exception as error:
                print(f"backpack: {path.stem} {len(seen)}: not built: {type(error).__name__}: {error}")
                continue
            yield f"{path.stem} {len(seen)}", made, inputs if isinstance(inputs, tuple) else (inputs,), 0


SUITES: dict[str, Callable[[], Iterator[Case]]] = {"opacus": opacus_cases, "torch": torch_cases}
"""In this order: torch's internal tests configure hypothesis to draw a tenth of the cases."""


def main(argv: list[str] | None = None) -> dict[str, Counter[str]]:
    """Print and return the counts of each suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--backpack", type=Path, help="a checkout of BackPACK's repository")
    parser.add_argument("--json", type=Path, help="where the counts are saved")
    parser.add_argument("--verbose", action="store_true", help="list the cases that are not counted, too")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    try:
        suites = {name: cases for name, cases in SUITES.items() if name in options.only}
        if options.backpack is not None:
            suites["backpack"] = partial(backpack_cases, options.backpack)
        for name, cases in suites.items():
            counts[name] = Counter()
            for case, module, inputs, dim in cases():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    verdict, why = judged(module, inputs, dim)
                counts[name][verdict] += 1
                if verdict in ("wrong", "refused") or (options.verbose and verdict != "exact"):
                    print(f"{name}: {case}: {verdict}: {why[:200]}", flush=True)
            print(f"{name}: {dict(counts[name])}", flush=True)
    finally:
        torch.set_num_threads(threads)
    if options.json is not None:
        options.json.write_text(json.dumps(counts, indent=2) + "\n")
    return counts


if __name__ == "__main__":
    main()

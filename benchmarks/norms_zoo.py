"""Exact norms of architectures that people use: the ratio to a training step, and the deviation from autograd."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from norms_families import Family, Loss, families
from torch import Tensor, nn

from dask_isgd.norms import NormEngine, capture_norms
from dask_isgd.norms.model_state import as_written
from dask_isgd.norms.tensor_trees import call, on_tensors


@dataclass(frozen=True)
class Row:
    """One line of the table; the ratios are the training step's time over that of the norms, the least of each."""

    name: str
    milliseconds: float
    """Of a training step."""
    norms: float
    capture: float | None
    """The ratio of a training step under ``capture_norms``; None if it yields no norms."""
    error: float
    """Largest deviation from autograd, one example at a time, in float64; relative."""
    fallback: tuple[str, ...]
    reason: str


def measure(name: str, family: Family, *, repeats: int) -> Row:
    """Return the line of one family, in eval mode."""
    torch.manual_seed(0)
    model = family.model().eval()
    inputs, targets = family.batch()
    scale = torch.full((len(targets),), 1 / len(targets))

    def output() -> Any:
        return call(model, inputs)

    def train() -> None:
        torch.dot(family.loss(output(), targets), scale).backward()

    def train_captured() -> Any:
        with capture_norms(model) as capture:
            train()
        return capture.norms(scale=scale), capture.reason

    engine = NormEngine(model, family.loss)
    norms = engine(inputs, targets)[0]
    wanted = loop(model, family.loss, inputs, targets)
    floor = 1e-3 * wanted.max()  # a loss that is saturated has a gradient of rounding errors
    error = float(((norms.double() - wanted).abs() / (wanted + floor)).max())
    inside, reason = train_captured()
    if inside is not None:
        error = max(error, float(((inside.double() - wanted).abs() / (wanted + floor)).max()))
    work: dict[str, Callable[[], Any]] = {"step": train, "norms": lambda: engine(inputs, targets)}
    if inside is not None:
        work["capture"] = train_captured
    seconds: dict[str, list[float]] = {key: [] for key in work}
    shuffler, order = random.Random(0), list(work)
    for _ in range(repeats):
        shuffler.shuffle(order)
        for key in order:
            start = time.process_time()
            work[key]()
            seconds[key].append(time.process_time() - start)
    least = {key: min(times) for key, times in seconds.items()}  # neighbours only add to a time
    step = least["step"]
    assert engine.plan is not None
    captured = step / least["capture"] if inside is not None else None
    return Row(name, 1e3 * step, step / least["norms"], captured, error, engine.plan.fallback, reason)


def loop(model: nn.Module, loss: Loss, inputs: Any, targets: Tensor) -> Tensor:
    """Return the norms by the definition: autograd in float64, one example at a time."""
    model = copy.deepcopy(as_written(model)).double()
    if getattr(model, "set_experts_implementation", None) is not None and hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # torch has no grouped products in float64
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = []
    for n in range(len(targets)):
        one = on_tensors(lambda t, n=n: t[n : n + 1].double() if t.is_floating_point() else t[n : n + 1], inputs)
        gradients = torch.autograd.grad(loss(call(model, one), targets[n : n + 1])[0], parameters, allow_unused=True)
        norms.append(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())
    return torch.stack(norms)


def report(row: Row) -> None:
    captured = "no" if row.capture is None else f"{row.capture:.2f}"
    slow = f"{len(row.fallback)} parameters one example at a time" if row.fallback else ""
    numbers = f"{row.milliseconds:.1f} | {row.norms:.2f} | {captured} | {row.error:.1e}"
    print(f"| {row.name} | {numbers} | {'; '.join(filter(None, (slow, row.reason[:140])))} |", flush=True)


def save(rows: list[Row], path: Path) -> None:
    """Put the lines into a file of results, beside those of other families."""
    saved = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        saved[row.name] = {key: value for key, value in dataclasses.asdict(row).items() if key != "name"}
    path.write_text(json.dumps(saved, indent=1) + "\n")


def main(*, tiny: bool, repeats: int, only: list[str] | None = None, results: Path | None = None) -> list[Row]:
    """Print and return the table, and save it to ``results``; AssertionError if a norm is not autograd's."""
    found, missing = families(tiny=tiny)
    print("| | step, ms | norms | step with norms | error | |\n|---|---:|---:|---:|---:|---|")
    rows = []
    for name, family in found.items():
        if only and not any(part.lower() in name.lower() for part in only):
            continue
        row = measure(name, family, repeats=repeats)
        report(row)
        assert row.error <= 1e-3, f"{name}: the norms deviate from autograd's by {row.error:.1e}"
        rows.append(row)
        if results is not None:
            save([row], results)
    for line in missing:
        print(f"\nLeft out: {line}.")
    return rows

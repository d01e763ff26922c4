"""The cost of the system: the learner's steps and the scorers' examples against plain PyTorch outside Dask.

    python benchmarks/cost.py                              # all rows, about an hour on two cores
    python benchmarks/cost.py --list
    python benchmarks/cost.py --rows 'uniform-*/mlp-64' start-up
    python benchmarks/cost.py --quick                      # a minute: that it runs; its figures mean little

Each row compares a run with a process of ``plain.py``: outside Dask, in the environment and with the allocator of the
system, with the same model, optimizer, minibatch and torch threads, on the same cores. The plain loop neither clips nor
checks anything; the run has its default settings, which clip, report and publish, but writes no checkpoints meanwhile.
Run and plain process work in turn, ``--repeats`` times each, for as long; while one works, the other is stopped. Ratios
are medians over the pairs. Kinds of rows:

* ``uniform-1``: uniform draws, one torch thread; one core for the learner's process, the other one for all else.
* ``uniform-2``: the same with two threads on both cores, against a plain loop with two threads.
* ``busy-neighbour``: the same while another program keeps one core busy, against a plain loop with one thread.
* ``feedback``: importance sampling with feedback, and scorers that have scored everything once and are idle.
  ResNet and transformer are compared with a plain loop that computes the norms of its minibatches too.
* ``importance``: the same without feedback.
* ``scored``, ``scored-importance``: the same two with scorers at work on the other core, against a plain loop beside a
  plain norm loop on that core: cores of one machine share caches and memory.
* ``scoring-1s``, ``scoring-0.1s``: examples scored per second by tasks of about this length, their waiting included,
  against the plain norm loop of the same pairs.
* ``start-up``: seconds of ``dask isgd train digits`` over its seconds of training and one import of torch, distributed,
  zarr, xarray and matplotlib.

``@client`` is ``distributed.Client()`` and ``@worker`` a ``dask scheduler`` with two ``dask worker``, both started in a
clean environment; all other rows use ``dask_isgd.LocalCluster``. Prints a line of JSON per row and a table at the end,
with page faults per step (scoring: per batch) and the kernel's share of CPU time, each of the run's process and of the
plain one, and with the ratio per second of CPU time of these processes: of little meaning for two threads, which spin
while they wait, but hardly disturbed by other programs on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from cost_arms import Measure, Plain, Running, write
from cost_clusters import CLUSTERS
from cost_problems import LEARNING_RATE, MOMENTUM, PROBLEMS, Problem
from cost_processes import Cores, clean_environment, pinned
from cost_rows import SYSTEM_SHARE, Row, rows
from cost_startup import START_UP, start_up, start_up_cells

import dask_isgd as isgd

NEVER = 10**7
QUICK = ("uniform-1/mlp-64", "scored/mlp-64", "start-up")
_GRAINS = (512, 64, 8, 1)
"""Examples per chunk of the data: few files, and tasks of about the length asked for."""


def comparison(row: Row, repeats: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Return the result of one row."""
    problem = PROBLEMS[row.problem]
    cores = sorted(os.sched_getaffinity(0))
    first, last = (None, None) if row.both_cores else ({cores[0]}, {cores[-1]})
    with ExitStack() as stack:
        stack.enter_context(pinned(last))
        chunk, n_rows, publish_every = None, problem.rows, None
        if row.task_seconds is not None:
            chunk, n_rows, publish_every = task_sizes(problem, row.task_seconds, first, last)
            seconds = max(seconds, 5 * row.task_seconds)
        data = write(problem, n_rows, folder, unit=math.gcd(chunk, _GRAINS[0]) if chunk is not None else 64)
        if row.neighbour:
            stack.enter_context(busy(cores[-1]))
        loops = [stack.enter_context(Plain(problem, row.work, row.plain_threads, first, rows=n_rows))]
        if row.scored:
            loops.append(stack.enter_context(Plain(problem, "norms", 1, last, rows=n_rows)))
        client = stack.enter_context(CLUSTERS[row.cluster](folder))
        run = stack.enter_context(
            Running(client, problem, data, folder / "run", first, **settings(row, problem, chunk, publish_every))
        )
        # The plain loop was the load of the time before, which a learner on all cores follows for one to two seconds.
        warm = min(2.5 if row.both_cores else 1.0, seconds)
        lasted = [run.window(warm, seconds)]
        plain = [together(loops, warm, lasted[0])]
        for _ in range(repeats - 1):
            lasted.append(run.window(warm, seconds))
            plain.append(together(loops, warm, lasted[-1]))
        run.end()
        ours = run.learned() if row.task_seconds is None else run.scored()
        theirs = [measures[0 if row.task_seconds is None else -1] for measures in plain]
        return {**summary(row, ours, theirs), "learner_threads": run.threads, "window_seconds": median(lasted)}


def task_sizes(problem: Problem, seconds: float, first: Cores, last: Cores) -> tuple[int, int, int]:
    """Return examples per scoring task of about ``seconds``, examples of the data, and steps between publications.

    There are more chunks than tasks in flight, and a version comes in less time than all chunks take.
    """
    with (
        Plain(problem, "training", 1, first, rows=problem.rows) as steps,
        Plain(problem, "norms", 1, last, rows=problem.rows) as norms,
    ):
        per_second = [measure.per_second for measure in together([steps, norms], 1.0, 2.0)]
    grain = next(grain for grain in _GRAINS if per_second[1] * seconds >= grain or grain == 1)
    chunk = max(1, int(per_second[1] * seconds / grain)) * grain
    n_chunks = 4 if seconds >= 1 else 16
    return chunk, n_chunks * chunk, max(1, int(per_second[0] * n_chunks * seconds / 4))


def settings(row: Row, problem: Problem, chunk: int | None, publish_every: int | None) -> dict[str, Any]:
    """Return the settings of a row's run: the defaults, apart from what the row is about."""
    learning: dict[str, Any] = {"publish_every": publish_every} if publish_every is not None else {}
    if not row.uniform and not row.scored:
        learning["publish_every"] = NEVER  # the first version only, so that scorers are idle from then on
    return {
        "learning": isgd.Learning(
            steps=NEVER,
            batch_size=problem.batch_size,
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            threads=row.learner_threads,
            checkpoint_seconds=NEVER,
            **learning,
        ),
        "sampling": isgd.Sampling(uniform=row.uniform, feedback=row.feedback, gate="open"),
        "scoring": isgd.Scoring(chunk_size=chunk, batch_size=problem.scoring_batch),
    }


def together(loops: Sequence[Plain], warm: float, seconds: float) -> list[Measure]:
    """Let plain processes work at the same time."""
    for loop in loops:
        loop.start(warm, seconds)
    return [loop.result() for loop in loops]


def summary(row: Row, ours: Sequence[Measure], plain: Sequence[Measure]) -> dict[str, Any]:
    """Return medians over the pairs, and whether they are what they must be."""
    ratios = [a.per_second / b.per_second for a, b in zip(ours, plain, strict=True)]
    cpu_ratio = median([a.per_cpu_second / b.per_cpu_second for a, b in zip(ours, plain, strict=True)])
    result: dict[str, Any] = {"row": row.name, "ratio": median(ratios), "cpu_ratio": cpu_ratio, "must": row.must}
    result["ratios"] = ratios
    for name, measures in (("ours", ours), ("plain", plain)):
        for field in dataclasses.fields(Measure):
            result[f"{name}_{field.name}"] = median([getattr(measure, field.name) for measure in measures])
    result["reached"] = result["ratio"] >= row.must
    if row.task_seconds is None:
        result["system_reached"] = result["ours_system_share"] < SYSTEM_SHARE
    return result


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Keep a core busy with another program."""
    with pinned({core}):
        program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| row | ours | plain | ratio | must reach | reached | per CPU second | page faults, ours / plain | kernel |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        reached = "yes" if r["reached"] and r.get("system_reached", True) else "**no**"
        measured = start_up_cells(r) if r["row"] == START_UP else cells(r)
        lines.append(f"| {' | '.join([r['row'], *measured[:4], reached, *measured[4:]])} |")
    return "\n".join(lines)


def cells(r: dict[str, Any]) -> list[str]:
    """Return the cells of a row between its name and the end, without whether it is reached."""
    return [
        f"{r['ours_per_second']:.4g}",
        f"{r['plain_per_second']:.4g}",
        f"{r['ratio']:.3f}",
        f"≥ {r['must']:g}" + (f", kernel < {SYSTEM_SHARE:.0%}" if "system_reached" in r else ""),
        f"{r['cpu_ratio']:.3f}",
        f"{r['ours_page_faults']:.3g} / {r['plain_page_faults']:.3g}",
        f"{r['ours_system_share']:.1%} / {r['plain_system_share']:.1%}",
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="names of rows, with * and ?; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="pairs per row")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a window, at least")
    parser.add_argument("--quick", action="store_true", help="one short pair per row, of few rows unless --rows")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    options = parser.parse_args(arguments)
    wanted = options.rows or (QUICK if options.quick else ["*"])
    everything: dict[str, Row | None] = {row.name: row for row in rows()} | {START_UP: None}
    chosen = [name for name in everything if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    if options.list:
        print("\n".join(chosen))
        return []
    if not chosen:
        parser.error(f"--rows: got {' '.join(wanted)}, wanted names that --list prints")
    repeats, seconds = (1, 1.0) if options.quick else (options.repeats, options.seconds)
    results = []
    for name in chosen:
        row = everything[name]
        with clean_environment(), tempfile.TemporaryDirectory() as folder:
            result = start_up(repeats, Path(folder)) if row is None else comparison(row, repeats, seconds, Path(folder))
        print(json.dumps(result), flush=True)
        results.append(result)
    print(table(results))
    return results


if __name__ == "__main__":
    main()

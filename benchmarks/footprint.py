"""What the library costs before it does anything: megabytes installed, CPU seconds to import it and to show its help.

    python benchmarks/footprint.py [--repeats 5]

`core_mb` sums the installed files of dask_isgd and of all that it requires, extras, torch and what only torch requires
left out; `torch_mb` is the rest. Each time is the least CPU time of several new processes, taken in turn, because
other processes of the machine add to it and nothing takes from it: `import_ratio` is
`import dask_isgd` divided by `import dask`, `help_ratio` is `dask isgd --help` divided by `dask --help`, both in an
environment where dask_isgd is installed, and `command_ratio` is `dask --help` with our command divided by the same
without any command of ours: every command of Dask loads them all. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

WITHOUT = (
    "import importlib.metadata as m; found = m.entry_points;"
    "m.entry_points = lambda **k: [e for e in found(**k) if e.name != 'isgd']; "
    "from dask.__main__ import main; import sys; sys.argv = ['dask', '--help']; main()"
)
COMMANDS = {
    "dask": ["-c", "import dask"],
    "dask_isgd": ["-c", "import dask_isgd"],
    "dask --help": ["-m", "dask", "--help"],
    "dask isgd --help": ["-m", "dask", "isgd", "--help"],
    "dask alone --help": ["-c", WITHOUT],
}


def required(name: str, found: dict[str, Distribution], leave_out: frozenset[str] = frozenset()) -> None:
    """Add a distribution and all that it requires, without extras, to ``found``; those not installed are left out."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in found or name in leave_out:
        return
    try:
        found[name] = distribution(name)
    except PackageNotFoundError:
        return
    for text in found[name].requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required(requirement.name, found, leave_out)


def megabytes(distributions: dict[str, Distribution]) -> float:
    """Return the size of all installed files of these distributions, bytecode included."""
    files = {Path(str(d.locate_file(file))) for d in distributions.values() for file in d.files or ()}
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def seconds(command: list[str]) -> float:
    """Return the CPU seconds of a new process of this Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    core: dict[str, Distribution] = {}
    everything: dict[str, Distribution] = {}
    required("dask_isgd", core, frozenset({"torch"}))
    required("dask_isgd", everything)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.repeats):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    least = {name: min(times) for name, times in taken.items()}
    result = {
        "core_mb": round(megabytes(core), 1),
        "torch_mb": round(megabytes(everything) - megabytes(core), 1),
        "import_ratio": round(least["dask_isgd"] / least["dask"], 3),
        "help_ratio": round(least["dask isgd --help"] / least["dask --help"], 3),
        "command_ratio": round(least["dask --help"] / least["dask alone --help"], 3),
        **{f"CPU seconds, {name}": round(value, 3) for name, value in least.items()},
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()

"""The transfer of a published version: its cost to the learner, and the time until every scorer has it.

    python benchmarks/publication.py          # 75 MB to 1, 2, 4 and 8 processes, about two minutes
    python benchmarks/publication.py --tiny   # what the tests run

Each scorer is a separate process on this machine. Medians of several versions:

* ``stall``: milliseconds for which the learner's loop is blocked: the copy of the parameters and the
  offer to the thread that publishes, as in ``dask_isgd.learner.task``; ``cpu``: the loop's CPU time in them,
  which does not depend on how busy the machine is;
* ``ours``: seconds from the publication until a task on every scorer has the tensors: scatter on the learner's
  worker, the ``Variable``, the announcement on a topic, a coordinator's task that receives it and submits one
  task per scorer, which fetch the tensors from the learner and from one another;
* ``bare``: seconds of the same transfer with Dask alone: tensors scattered on the learner's worker by a
  client that immediately submits one task per scorer.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
from typing import Any

import torch
from distributed import Client, Nanny, Scheduler, SpecCluster, get_client, get_worker, secede, wait

from dask_isgd.events import Published
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.runtime import codec, pubsub
from dask_isgd.runtime.parameters import forget, newest, open_variable, publish

SIZES = (1, 2, 4, 8)


def parameters(megabytes: float) -> dict[str, torch.Tensor]:
    """float32 tensors like an MLP's: five large ones."""
    each = int(megabytes * 1e6 / 4 / 5)
    return {f"layer{i}": torch.full((each,), float(i)) for i in range(5)}


def cluster(scorers: int) -> SpecCluster:
    def worker(resources: dict[str, float], threads: int) -> dict[str, Any]:
        options = {"nthreads": threads, "resources": resources, "memory_limit": 0, "silence_logs": 40}
        return {
            "cls": Nanny,
            "options": {**options, "host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"},
        }

    workers = {"learner": worker({"learner": 1}, 2), "coordinator": worker({"coordinator": 1}, 2)}
    workers |= {f"scorer-{i}": worker({"scorer": 1}, 1) for i in range(scorers)}
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=40)  # type: ignore[no-untyped-call]


def receive(tensors: dict[str, torch.Tensor], _: str) -> float:
    """Return the time at which a scorer has the tensors."""
    assert float(tensors["layer4"][-1]) == 4.0
    return time.time()


def publish_ours(megabytes: float, run: str, versions: int) -> list[tuple[float, float, float]]:
    """Act as the learner; return when each version was offered, the loop's blocked milliseconds, and those of CPU."""
    torch.set_num_threads(1)
    worker, client = get_worker(), get_client()
    state, snapshots, background = (
        parameters(megabytes),
        Snapshots(codec.pack),
        LatestJobWorker("publication", 60).open(),
    )
    events = pubsub.subscribe(client, f"{run}-done")
    rows, held = [], []
    for version in range(versions):
        began = time.time()
        start, cpu = time.perf_counter(), time.thread_time()
        tensors = snapshots.take(state)

        def job(tensors: dict[str, torch.Tensor] = tensors, version: int = version) -> None:
            done = publish(client, run, tensors, run=run, incarnation=1, version=version)
            held.append(done.future)
            del held[:-2]
            event = Published(run=run, incarnation=1, version=version, address=worker.address, checkpoint=None)
            pubsub.announce(worker, run, event)

        background.offer(job)
        del tensors, job
        rows.append((began, 1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - cpu)))
        while (event := events.get(60)) is None or event.version != version:  # type: ignore[attr-defined]
            pass
    events.close()
    background.close()
    return rows


def coordinate(run: str, versions: int, scorers: list[str]) -> list[float]:
    """Act as the coordinator; return when the last scorer had each version."""
    worker, client = get_worker(), get_client()
    secede()
    events, rows = pubsub.subscribe(client, run), []
    while len(rows) < versions:
        event = events.get(60)
        if not isinstance(event, Published):
            continue
        found = newest(client, run, 60)
        assert found is not None
        futures = [
            client.submit(receive, found.future, uuid.uuid4().hex, workers=[address], pure=False) for address in scorers
        ]
        rows.append(max(client.gather(futures)))
        pubsub.announce(worker, f"{run}-done", event)
    events.close()
    return rows


def publish_bare(megabytes: float, scorers: list[str]) -> float:
    """Transfer with Dask alone: scatter here, one task on each scorer; return the seconds."""
    client, tensors = get_client(), parameters(megabytes)
    secede()
    began = time.time()
    key = f"bare-{uuid.uuid4().hex}"
    future = client.scatter({key: tensors}, hash=False)[key]
    futures = [client.submit(receive, future, uuid.uuid4().hex, workers=[address], pure=False) for address in scorers]
    return max(client.gather(futures)) - began


def measure(scorers: int, megabytes: float, versions: int) -> dict[str, float]:
    with cluster(scorers) as made, Client(made) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        addresses = [a for a, w in workers.items() if "scorer" in w["resources"]]
        run = f"bench-{uuid.uuid4().hex[:6]}"
        open_variable(client, run)
        bare = []
        for _ in range(versions):
            one = client.submit(publish_bare, megabytes, addresses, pure=False, resources={"learner": 1})
            bare.append(one.result(timeout=120))
        arrived = client.submit(coordinate, run, versions, addresses, pure=False, resources={"coordinator": 1})
        offered = client.submit(publish_ours, megabytes, run, versions, pure=False, resources={"learner": 1})
        wait([arrived, offered], timeout=300)
        rows = list(zip(offered.result(), arrived.result(), strict=True))
        forget(client, run)
    later = rows[1:] or rows  # the first has new buffers, and processes that have not imported torch
    return {
        "scorers": scorers,
        "stall_ms": statistics.median(stall for (_, stall, _), _ in later),
        "stall_worst_ms": max(stall for (_, stall, _), _ in later),
        "cpu_ms": statistics.median(cpu for (_, _, cpu), _ in later),
        "ours_s": statistics.median(end - began for (began, _, _), end in later),
        "bare_s": statistics.median(bare[1:] or bare),
    }


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=75.5, help="default: those of the paper's network")
    parser.add_argument("--scorers", type=int, action="append", help="processes (repeatable; default: 1, 2, 4 and 8)")
    parser.add_argument("--versions", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="one megabyte to two processes: a test that it runs")
    options = parser.parse_args(argv)
    if options.tiny:
        options.megabytes, options.scorers, options.versions = 1.0, [2], 2
    results = []
    for scorers in options.scorers or SIZES:
        found = measure(scorers, options.megabytes, options.versions)
        results.append(found)
        print(
            f"{options.megabytes:g} MB to {scorers} processes: stall {found['stall_ms']:.1f} ms "
            f"(worst {found['stall_worst_ms']:.1f}, cpu {found['cpu_ms']:.1f}), "
            f"ours {found['ours_s']:.3f} s, bare {found['bare_s']:.3f} s, "
            f"ratio {found['ours_s'] / found['bare_s']:.2f}",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()

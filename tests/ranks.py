"""Processes of one gloo process group, which run a function of a test."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # optimizers and DDP import it when first used: once here, not in each process
import torch.distributed as dist
import torch.multiprocessing as mp


def _run(rank: int, check: Callable[[int, int], None], count: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
        torch.set_num_threads(1)
        check(rank, count)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)


def run_ranks(check: Callable[[int, int], None], count: int, folder: Path) -> None:
    """Run ``check(rank, count)`` in ``count`` processes; fail with what they raise."""
    processes = [
        mp.get_context("fork").Process(target=_run, args=(rank, check, count, str(folder))) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    errors = "".join(error.read_text() for error in folder.glob("error-*"))
    if errors or [process.exitcode for process in processes] != [0] * count:
        pytest.fail(errors or f"exit codes {[process.exitcode for process in processes]}")

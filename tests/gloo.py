"""Processes of a gloo group, forked and joined by a test."""

from __future__ import annotations

import importlib
import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(check: Callable[[int], object], folder: Path, count: int = 2, timeout: float = 150) -> None:
    """Call ``check(rank)`` in processes that torchrun could have started; their errors are this one's."""
    importlib.import_module("torch._dynamo")  # which optimizers and DDP import: here once, not in each process
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    processes = [context.Process(target=_run, args=(check, rank, count, port, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        process.kill()
    errors = "".join(error.read_text() for error in folder.glob("error-*"))
    if errors or [process.exitcode for process in processes] != [0] * count:
        pytest.fail(errors or f"exit codes {[process.exitcode for process in processes]}")


def in_group(check: Callable[[int, int], object], folder: Path, count: int) -> None:
    """Call ``check(rank, count)`` in the processes of a process group, the default one of each."""
    in_processes(partial(_grouped, check, count), folder, count)


def _grouped(check: Callable[[int, int], object], count: int, rank: int) -> None:
    dist.init_process_group("gloo")
    check(rank, count)
    dist.barrier()
    dist.destroy_process_group()


def _run(check: Callable[[int], object], rank: int, count: int, port: int, folder: str) -> None:
    os.environ |= {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        torch.set_num_threads(1)
        check(rank)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)

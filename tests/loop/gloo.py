"""Processes of a gloo group, forked and joined by a test."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp


def in_processes(check: Callable[[int], object], folder: Path, count: int = 2, timeout: float = 150) -> None:
    """Call ``check(rank)`` in processes that torchrun could have started; their errors are this one's."""
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
    assert "".join(error.read_text() for error in folder.glob("error-*")) == ""
    assert [process.exitcode for process in processes] == [0] * count


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

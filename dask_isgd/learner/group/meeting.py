"""Where the ranks of a group meet: a store of ``torch.distributed`` on rank 0's worker, and the process group."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dask_isgd.errors import ConfigError
from dask_isgd.learner.gradient_sum import GroupLostError


class Meeting(NamedTuple):
    """The address of a store."""

    host: str
    port: int


def call_meeting(host: str, timeout: float) -> tuple[Meeting, TCPStore]:
    """Open a store that listens on the address ``host`` of this machine, and on no other."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=128)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return Meeting(host, port), store


def attend(meeting: Meeting, timeout: float) -> TCPStore:
    """Connect to the store of a meeting. Raises GroupLostError if there is none any more."""
    try:
        return TCPStore(*meeting, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        raise GroupLostError(f"rank 0 cannot be reached at {meeting.host}:{meeting.port}: {error}") from error


def form(store: Store, rank: int, count: int, device: torch.device, host: str, timeout: float) -> None:
    """Make the default process group of this process: nccl for CUDA devices, otherwise gloo.

    ``host`` is this worker's address: its interface is used. No collective takes more than ``timeout`` seconds.
    Raises GroupLostError if not all ranks come.
    """
    if dist.is_initialized():
        raise ConfigError(
            "Learning.learners: this process is in a process group of torch.distributed already, wanted one learner "
            "per process; start workers that are processes of their own"
        )
    if (interface := _interface_of(host)) is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface)
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        dissolve()
        raise GroupLostError(f"rank {rank} of {count}: not all ranks came to the process group: {error}") from error


def dissolve() -> None:
    """Leave the process group of this process, if it is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _interface_of(host: str) -> str | None:
    found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] in found for each in addresses):
            return str(name)
    return None

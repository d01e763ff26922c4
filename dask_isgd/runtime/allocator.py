"""Memory that a process has freed stays with it, so that the next training step does not fault it in again.

Dask's nannies start workers with ``MALLOC_TRIM_THRESHOLD_=65536``
(``distributed.nanny.pre-spawn-environ``): glibc then returns freed memory to the kernel at every opportunity, and
gives up adapting its thresholds to the program. A training step frees and allocates all its gradients and
activations, which costs 2,000 (MLP 784-512×3-10) to 41,000 (3072-2048×4-10) page faults per step and up to a third
of its time. glibc reads the variable once, before ``main``; ``mallopt`` changes the thresholds in a running process.
"""

from __future__ import annotations

import ctypes
import functools
import json
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
MOST_KEPT = 2**30
"""Bytes of freed memory at the end of the heap that a process keeps at most."""
WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(MOST_KEPT)}
"""For workers from their start: what ``keep_freed_memory`` sets later, as far as a variable can."""
EXPORT = f"export DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON='{json.dumps(WORKER_ENVIRONMENT)}'"
"""The same for ``dask worker``, as a line of shell script; the other variables that nannies set stay."""
_MMAP_THRESHOLD = 32 * 2**20
"""The size up to which glibc would adapt its threshold by itself; larger blocks are mapped one by one."""
_TOP_PAD = 64 * 2**20


@functools.cache
def keep_freed_memory(memory_limit: int | None = None) -> bool:
    """Let this process keep freed memory: 1 GiB at most, and at most a quarter of ``memory_limit`` bytes.

    Applies to the whole process, and costs nothing when it is called again. Returns whether the C library took the
    settings: only glibc knows them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    kept = MOST_KEPT if not memory_limit else min(MOST_KEPT, memory_limit // 4)
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_TRIM_THRESHOLD, kept),
        (_M_MMAP_THRESHOLD, min(_MMAP_THRESHOLD, kept)),
        (_M_TOP_PAD, min(_TOP_PAD, kept)),
    )
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)

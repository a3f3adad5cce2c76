"""How many cores there are, and how BLAS is held to one of them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from threadpoolctl import ThreadpoolController

__all__ = ["default_workers", "single_threaded"]


def default_workers() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_POOLS: list[ThreadpoolController] = []


def single_threaded() -> AbstractContextManager[object]:
    """Hold BLAS to one thread for a `with` block: sums then have one order, whatever the machine's number of cores.

    The limit is the process's; hold it around a pool of threads, not inside each of them.
    """
    import scipy.linalg  # noqa: F401  loads SciPy's BLAS, which the controller must find

    if not _POOLS:
        _POOLS.append(ThreadpoolController())
    return _POOLS[0].limit(limits=1, user_api="blas")

"""What this process runs on, and the memory it takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any


def give_back_free_memory() -> None:
    """Return freed heap memory to the system, where the C library can (glibc); elsewhere do nothing.

    While weights are quantized one after the other, small results that stay pin a heap full of freed
    temporaries: without this, a loaded model can hold more memory than it had unquantized.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def cpu_name() -> str:
    """What this machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class PeakMemory:
    """The largest resident set of this process from now on.

    exact: whether the system lets a process reset its own peak (Linux does). Otherwise the peak may
    date from before, and what is reported is an upper bound.
    """

    def __init__(self) -> None:
        gc.collect()
        give_back_free_memory()  # else the model would reuse it, and go uncounted
        self.exact = _reset_peak()
        self.start = resident_bytes()

    def bytes_above_start(self) -> int:
        """Bytes between the resident set at the start and the largest one since."""
        return max(0, peak_resident_bytes() - self.start)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(_process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes everywhere but on macOS
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def resident_bytes() -> int:
    """The resident set of this process now, in bytes."""
    return int(_process().memory_info().rss)


def _process() -> Any:
    import psutil

    return psutil.Process()

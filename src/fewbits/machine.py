"""What this process runs on, and the memory it takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HUGE_PAGE = 2**21  # bytes
_OPENMP = re.compile(r"/[^\n]*/lib(?:gomp|iomp5?|omp)[^/\n]*\.(?:so|dylib)[^/\n]*")


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


def huge_pages(nbytes: int) -> tuple[mmap.mmap, int]:
    """(memory, where in it `nbytes` begin): memory that the system may back with pages of 2 MiB.

    What is read once per token, as packed weights are, is read faster from such pages: the processor looks up
    far fewer addresses. Where the system has none, these are ordinary pages. Pages that are never touched,
    before the beginning and behind the end, take no memory.
    """
    # Python's default is memory to share, which systems rarely back with huge pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, **private)
    anchor = ctypes.c_char.from_buffer(memory)
    start = -ctypes.addressof(anchor) % HUGE_PAGE
    del anchor  # it would keep `memory` from being closed
    whole = nbytes // HUGE_PAGE * HUGE_PAGE  # a huge page that is filled in part would waste the rest
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memory, start


def forget_file_pages(address: int, nbytes: int) -> bool:
    """Stop counting memory as this process's, if it is unchanged pages of a file; whether it was.

    A checkpoint that is mapped stays in the resident memory of the process once it was read, though nobody
    needs it any more. What is read again comes from the system's cache of the file. Memory that is not a
    file's, or was written to, stays as it is.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= start or not hasattr(mmap, "MADV_DONTNEED") or not _are_file_pages(start, end):
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(advise(start, end - start, mmap.MADV_DONTNEED)) == 0


def _are_file_pages(start: int, end: int) -> bool:
    """Whether every page that is in memory is a file's: /proc/pid/pagemap has 8 bytes for each."""
    first, count = start // mmap.PAGESIZE, (end - start) // mmap.PAGESIZE
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            flags = os.pread(pagemap.fileno(), 8 * count, 8 * first)[7::8]
    except OSError:
        return False
    present, swapped, file = 0x80, 0x40, 0x20  # bits 63, 62 and 61
    known = {entry: entry & file or not entry & (present | swapped) for entry in set(flags)}
    return len(flags) == count and all(known.values())


def versions(*packages: str) -> dict[str, str]:
    """The versions of fewbits and of `packages`, which are installed."""
    try:
        own = version("fewbits")
    except PackageNotFoundError:  # a source tree that was not installed
        own = "0+source"
    return {"fewbits": own} | {package: version(package) for package in packages}


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


def cpu_quota() -> float | None:
    """Cores' worth of time that control groups allow this process; None: no limit."""
    limits = []
    for found in _control_groups("cpu.max"):
        quota, _, period = found.partition(" ")
        limits += [int(quota) / int(period)] if quota != "max" else []
    quotas = zip(_control_groups("cpu.cfs_quota_us"), _control_groups("cpu.cfs_period_us"), strict=False)
    limits += [int(quota) / int(period) for quota, period in quotas if int(quota) > 0]
    return min(limits, default=None)


def cpu_flags() -> frozenset[str]:
    """What the processor says it can do, in the words of Linux; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


@dataclass(frozen=True)
class Memory:
    """Bytes of a machine or an accelerator; limit: what control groups leave this process, if they do."""

    total: int
    available: int
    limit: int | None = None


def memory() -> Memory:
    """Main memory. `available` respects the limit of control groups."""
    import psutil

    system = psutil.virtual_memory()
    texts = [*_control_groups("memory.max"), *_control_groups("memory.limit_in_bytes")]
    limit = min((int(text) for text in texts if text != "max"), default=system.total)
    if limit >= system.total:
        return Memory(system.total, system.available)
    return Memory(system.total, max(0, min(system.available, limit - resident_bytes())), limit)


def accelerators() -> dict[str, tuple[str, Memory]]:
    """Device → (what it is called, its memory) of all that torch can use now."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return {}
    backend: Any = getattr(torch, kind.type)
    if kind.type == "mps":  # shares main memory
        total = int(backend.recommended_max_memory())
        return {"mps": (cpu_name(), Memory(total, total - int(backend.current_allocated_memory())))}
    found = {}
    for index in range(torch.accelerator.device_count()):
        free, total = backend.mem_get_info(index)
        found[f"{kind.type}:{index}"] = (str(backend.get_device_name(index)), Memory(total, free))
    return found


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process, by address; [] where there is no /proc."""
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8", errors="surrogateescape") if maps.is_file() else ""
    return list(dict.fromkeys(found[0] for found in _OPENMP.finditer(text)))


def _control_groups(name: str) -> Iterator[str]:
    """The text of the file `name` in every control group that this process is in, and those around them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root = Path("/sys/fs/cgroup", controllers)
        inner = root / group.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                yield (folder / name).read_text().strip()


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

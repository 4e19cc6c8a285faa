"""The roofs: a small C file, compiled here, that does nothing but read, write or multiply."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from bench.contenders import ROOFS
from bench.libraries import HERE, RefusedError, Task, Work

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "read": 3, "read, 2 MiB pages": 3, "write, streaming": 4}
BYTES = 16 << 20  # of a pass that reads or writes, at least; the rotation otherwise
SECONDS = 4e-3  # about, of a pass that multiplies


def versions() -> dict[str, str]:
    return {}


@lru_cache(maxsize=1)
def machine() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RefusedError("no C compiler (cc) is installed, so the roofs are not measured")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "machine.so")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC"]
        command = [compiler, *flags, str(HERE.parent / "machine.c"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RefusedError(f"{compiler} cannot compile machine.c: {done.stderr.strip()[-300:]}")
        loaded = ctypes.CDLL(str(library))
    loaded.buffer.restype = ctypes.c_void_p
    loaded.buffer.argtypes = [ctypes.c_int64, ctypes.c_int]
    loaded.operations.restype = ctypes.c_int64
    loaded.operations.argtypes = [ctypes.c_int]
    # `pass` is a word of Python's
    getattr(loaded, "pass").restype = ctypes.c_int64
    getattr(loaded, "pass").argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return loaded


def prepare(task: Task) -> Work:
    """`nbytes` of the result is what a pass moves, or its operations: rate = nbytes / time."""
    library, kind = machine(), KINDS[task.variant]
    one_pass = getattr(library, "pass")
    if ROOFS[task.variant] == "GB/s":
        size = max(BYTES, task.rotation)
        memory = buffer(size, "2 MiB" in task.variant)
        return Work(lambda i: one_pass(kind, memory, size, task.threads), 1, size, timed=True)
    each = library.operations(kind)
    if not each:
        raise RefusedError(f"this processor has no {task.variant} instructions")
    rounds = 1000
    while (took := one_pass(kind, None, rounds, 1)) < SECONDS * 1e9:
        rounds = max(rounds + 1, int(rounds * min(10.0, 1.1 * SECONDS * 1e9 / max(took, 1))))
    return Work(
        lambda i: one_pass(kind, None, rounds, task.threads), 1, each * rounds * task.threads, timed=True
    )


@lru_cache(maxsize=2)
def buffer(size: int, huge: bool) -> int:
    memory = machine().buffer(size, huge)
    if not memory:
        raise RefusedError(f"no memory for a buffer of {size} bytes")
    return int(memory)

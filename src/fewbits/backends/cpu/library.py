"""The shared library of CPU kernels (csrc/): found, loaded once, and asked what this machine runs.

FEWBITS_ISA      forces an instruction set: one of the names of `instruction_sets()`
FEWBITS_LIBRARY  loads this file instead of the one that was installed, for development
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from fewbits.backends.cpu.structs import Encoding, Moments, Product, StepOf, Weight
from fewbits.machine import openmp_runtimes

ABI = 3  # FEWBITS_ABI of csrc/api.h
_NAME = "libfewbits_cpu.dylib" if sys.platform == "darwin" else "libfewbits_cpu.so"
_RTLD_NOLOAD = getattr(os, "RTLD_NOLOAD", 0)

_WEIGHT, _ENCODING, _PRODUCT = (ctypes.POINTER(struct) for struct in (Weight, Encoding, Product))
_MOMENTS, _STEP = ctypes.POINTER(Moments), ctypes.POINTER(StepOf)
# fmt: off
_SIGNATURES: dict[str, tuple[list[object], object]] = {
    "fewbits_abi": ([], c_int32),
    "fewbits_error": ([], c_char_p),
    "fewbits_set_parallel": ([c_void_p], c_int32),
    "fewbits_isas": ([], c_char_p),
    "fewbits_best_isa": ([], c_char_p),
    "fewbits_refuse_isa": ([c_char_p], c_char_p),
    "fewbits_use_isa": ([c_char_p], c_int32),
    "fewbits_dequantize": (
        [_WEIGHT, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int32, c_int32],
        c_int32,
    ),
    "fewbits_quantize": (
        [_ENCODING, c_void_p, c_int64, c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64,
         c_void_p, c_int64, c_int32],
        c_int32,
    ),
    "fewbits_mean": ([c_void_p, c_int64, c_int32, c_void_p], c_int32),
    "fewbits_linear": ([_WEIGHT, _PRODUCT], c_int32),
    "fewbits_linear_a8": ([_WEIGHT, _PRODUCT, c_int64], c_int32),
    "fewbits_linear_int8": ([_WEIGHT, _PRODUCT, c_float], c_int32),
    "fewbits_update": ([_MOMENTS, c_int64, _STEP], c_int32),
}
# fmt: on

BAD_VALUES = 2
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: ValueError, 3: MemoryError, 4: NotImplementedError}


class UnavailableError(Exception):
    """There is no library here that can be used; says why, and what to do."""


def unavailable() -> str | None:
    """Why there are no CPU kernels here, or None. ValueError when FEWBITS_ISA cannot be followed."""
    return _answer()[1]


def library() -> ctypes.CDLL:
    """The library, loaded and set up. `UnavailableError` says why not."""
    loaded, reason = _answer()
    if loaded is None:
        raise UnavailableError(reason)
    return loaded


def check(status: int, what: str) -> None:
    """Raise what the library said when `status` is not 0; `what` was being done."""
    if status:
        text = library().fewbits_error().decode()
        raise _ERRORS.get(status, RuntimeError)(f"{what}: {text}")


def instruction_sets() -> dict[str, str]:
    """Every instruction set compiled in, best first: "used", why it is not, or "not reached"."""
    loaded = library()
    forced, answer = os.environ.get("FEWBITS_ISA"), {}
    for name in loaded.fewbits_isas().decode().split(","):
        reason = loaded.fewbits_refuse_isa(name.encode())
        if reason:
            answer[name] = reason.decode()
        elif name == forced or (not forced and "used" not in answer.values()):
            answer[name] = "used"
        else:
            answer[name] = f"FEWBITS_ISA is {forced}" if forced else "not reached"
    return answer


@lru_cache(maxsize=1)
def _answer() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _load(), None
    except UnavailableError as problem:
        return None, str(problem)


def _load() -> ctypes.CDLL:
    path = _find()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as problem:
        raise UnavailableError(f"its library {path} cannot be loaded: {problem}") from problem
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise UnavailableError(f"its library {path} has no function {name}; build it anew")
        function.argtypes, function.restype = arguments, result
    if loaded.fewbits_abi() != ABI:
        raise UnavailableError(
            f"its library {path} has interface {loaded.fewbits_abi()}, not {ABI}; build it anew"
        )
    _choose_instruction_set(loaded)
    loaded.fewbits_set_parallel(_parallel())
    return loaded


def _find() -> Path:
    """FEWBITS_LIBRARY, or beside this file. An editable install adds a folder to the package's path."""
    given = os.environ.get("FEWBITS_LIBRARY")
    if given:
        if not Path(given).is_file():
            raise UnavailableError(f"FEWBITS_LIBRARY is {given}, which is no file")
        return Path(given)
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    for folder in folders:
        if (folder / _NAME).is_file():
            return folder / _NAME
    raise UnavailableError(
        f"its library {_NAME} was not built: install fewbits from a wheel, or with a C++ compiler at hand"
    )


def _choose_instruction_set(loaded: ctypes.CDLL) -> None:
    forced = os.environ.get("FEWBITS_ISA")
    names = loaded.fewbits_isas().decode().split(",")
    works = [name for name in names if not loaded.fewbits_refuse_isa(name.encode())]
    if not works:
        raise UnavailableError(f"this machine runs none of the instruction sets {', '.join(names)}")
    if forced and loaded.fewbits_use_isa(forced.encode()):
        reason = loaded.fewbits_error().decode()
        raise ValueError(
            f"FEWBITS_ISA is {forced!r}: {reason}; write one of {', '.join(works)}, or unset it for "
            f"{works[0]}"
        )


def _parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch uses, or None: one thread then.

    A second runtime would have threads of its own, which spin on the same cores as torch's.
    """
    near_torch = str(Path(torch.__file__).parent.parent)
    for path in sorted(openmp_runtimes(), key=lambda path: not path.startswith(near_torch)):
        try:
            return ctypes.cast(ctypes.CDLL(path, mode=_RTLD_NOLOAD).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None

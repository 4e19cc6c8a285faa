"""Memory of this process."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
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

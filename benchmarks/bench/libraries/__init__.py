"""One file per library: how it stores a weight and multiplies with it.

Each has `versions()` and `prepare(task)`. A library is imported in the worker process that times it and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MOST_COPIES = 256  # of small weights: a few megabytes of them sit in a cache, whatever is done


class RefusedError(Exception):
    """The library cannot do this piece of work here; the text says why."""


@dataclass(frozen=True)
class Task:
    """A piece of work as it is sent to a worker.

    weight    a .npy file, float32 [N, K], the values already rounded to bfloat16
    rotation  bytes that the copies of the stored weight take together, so that no cache holds them
    """

    variant: str
    work: str
    x: str
    weight: str
    rotation: int
    threads: int

    def read_weight(self) -> np.ndarray:
        return np.load(self.weight)

    def copies(self, nbytes: int) -> int:
        """How many copies of a weight of `nbytes` bytes fill the rotation; two at least, and not too many."""
        return min(MOST_COPIES, max(2, -(-self.rotation // max(nbytes, 1))))


@dataclass
class Work:
    """A piece of work, ready to be timed.

    run        does it once, with copy i of the weight
    nbytes     of one stored weight: codes and scales, what a product has to read
    set_input  takes x [M, K] float32; converts it outside of the timing
    output     the product of copy 0 with the input set last, float32 [M, N]
    decoded    the weight as the library understands its codes, float32 [N, K]
    timed      `run` returns the nanoseconds it took (roofs); otherwise the worker reads the clock
    """

    run: Callable[[int], Any]
    copies: int
    nbytes: int
    set_input: Callable[[np.ndarray], None] = lambda x: None
    output: Callable[[], np.ndarray] | None = None
    decoded: Callable[[], np.ndarray] | None = None
    timed: bool = False
    note: str = ""
    keep: list[Any] = field(default_factory=list)


HERE = Path(__file__).resolve().parent

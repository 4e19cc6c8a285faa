"""Optimizers whose states take about 2 bytes per parameter instead of 8.

They take the arguments of bitsandbytes' optimizers of the same names and load their state dicts. How moments
are stored and rounded: `fewbits.moments`.
"""

from fewbits.optim.adam import (
    Adam8bit,
    AdamW8bit,
    AdamW32bit,
    PagedAdam8bit,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from fewbits.optim.blockwise import BlockwiseOptimizer, StateMemory
from fewbits.optim.lion import Lion8bit, Lion32bit, PagedLion8bit, PagedLion32bit
from fewbits.optim.sgd import SGD8bit

__all__ = [
    "Adam8bit",
    "AdamW8bit",
    "AdamW32bit",
    "BlockwiseOptimizer",
    "Lion8bit",
    "Lion32bit",
    "PagedAdam8bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion8bit",
    "PagedLion32bit",
    "SGD8bit",
    "StateMemory",
]

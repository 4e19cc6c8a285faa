"""Kernels for CPUs: the library of csrc/, for every Format, on whatever instruction set this machine has."""

from __future__ import annotations

import torch

from fewbits.backends.cpu.codes import dequantize, embedding, quantize
from fewbits.backends.cpu.library import instruction_sets, unavailable
from fewbits.backends.cpu.moments import update
from fewbits.backends.cpu.products import fixed_linear, linear, linear_a8, linear_backward, linear_int8
from fewbits.format import Format

__all__ = [
    "dequantize",
    "embedding",
    "fixed_linear",
    "instruction_sets",
    "linear",
    "linear_a8",
    "linear_backward",
    "linear_int8",
    "quantize",
    "refuse",
    "unavailable",
    "update",
]


def refuse(op: str, format: Format, device: torch.device) -> str | None:
    """Why `op` on weights in `format` on `device` is not computed here, or None."""
    if device.type != "cpu":
        return f"has no kernels for {device.type}"
    return unavailable()

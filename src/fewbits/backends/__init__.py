"""Who computes an op: an ordered list of backends, best first.

`choose` takes the first that supports the case; `explain` says for each why it was passed over. The last,
`reference`, supports everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbits import moments, reference
from fewbits.backends import cpu
from fewbits.format import Format
from fewbits.tensor import QuantizedTensor

OPS = ("quantize", "dequantize", "linear", "linear_backward", "linear_int8", "linear_a8", "embedding")


class Kernels(Protocol):
    """The functions a backend has, with the meaning that `fewbits.reference` gives them."""

    def quantize(self, weight: Tensor, format: Format, name: str = ...) -> QuantizedTensor: ...
    def dequantize(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor: ...
    def linear(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor: ...
    def linear_backward(self, grad: Tensor, weight: QuantizedTensor) -> Tensor: ...
    def linear_int8(
        self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, threshold: float
    ) -> Tensor: ...
    def linear_a8(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, group: int) -> Tensor: ...
    def embedding(self, indices: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A set of kernels; `refuse(op, format, device)` returns why not, or None when it supports the case.

    `instruction_sets` tells which one its kernels run on, and why not the others: name → reason or "used".
    """

    name: str
    kernels: Kernels
    refuse: Callable[[str, Format, torch.device], str | None]
    instruction_sets: Callable[[], dict[str, str]] | None = None


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", cpu, cpu.refuse, cpu.instruction_sets),
    Backend("reference", reference, lambda op, format, device: None),
)


def choose(op: str, format: Format, device: torch.device) -> Kernels:
    """The kernels of the first backend that supports `op` on weights in `format` on `device`."""
    return next(b.kernels for b in BACKENDS if b.refuse(op, format, device) is None)


def choose_update(device: torch.device) -> Callable[..., None]:
    """`fewbits.moments.update` for tensors on `device`: that of the C++ library, or the specification."""
    return cpu.update if device.type == "cpu" and cpu.unavailable() is None else moments.update


def explain(format: Format | str, device: torch.device | str = "cpu") -> dict[str, dict[str, str]]:
    """For every op: each backend in order, with "used", why it was refused, or "not reached".

    Under "instruction set" the same for those that the kernels of a backend in use were compiled for.
    """
    format, device = Format.parse(format), torch.device(device)
    answer: dict[str, dict[str, str]] = {}
    for op in OPS:
        row = answer[op] = {}
        for backend in BACKENDS:
            taken = "used" in row.values()
            row[backend.name] = "not reached" if taken else backend.refuse(op, format, device) or "used"
    for backend in BACKENDS:
        if backend.instruction_sets and any(answer[op][backend.name] == "used" for op in OPS):
            answer["instruction set"] = backend.instruction_sets()
    return answer

"""fewbits itself.

`variant`: the scheme of a layer ("nf4:g64", "int8:row@int8:t6"), or "function " and a scheme.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

import fewbits
from bench.libraries import RefusedError, Task, Work
from fewbits import backends
from fewbits.nn import QuantLinear

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
torch.set_grad_enabled(False)


def versions() -> dict[str, str]:
    found = {"fewbits": fewbits.__version__, "torch": torch.__version__}
    if "FEWBITS_ISA" not in os.environ:
        answers = backends.explain("nf4:g64")["linear"]
        used = next(f"{name}{answer[4:]}" for name, answer in answers.items() if answer.startswith("used"))
        refusals = [
            f"{name}: {answer}" for name, answer in answers.items() if used == "reference" and name != used
        ]
        found["fewbits computes with"] = "; ".join([used, *refusals])
    return found


def prepare(task: Task) -> Work:
    return {"linear": linear, "dequantize": dequantize, "quantize": quantize}[task.work](task)


def linear(task: Task) -> Work:
    kind, _, spelling = task.variant.rpartition(" ")
    weight_format, _, activation = spelling.partition("@")
    try:
        scheme = fewbits.Scheme.parse(spelling)
    except ValueError as reason:
        raise RefusedError(f"not in this version: {reason}") from None
    stored = fewbits.quantize(torch.from_numpy(task.read_weight()).bfloat16(), weight_format)
    copies = [copy_of(stored) for _ in range(task.copies(stored.nbytes))]
    inputs: list[torch.Tensor] = []

    def set_input(x: np.ndarray) -> None:
        inputs[:] = [torch.from_numpy(x).to(DTYPES[task.x])]

    layers = [layer_of(copy, scheme) for copy in copies]

    def through_layer(i: int) -> Any:
        return layers[i](inputs[0])

    def through_function(i: int) -> Any:
        return fewbits.linear(inputs[0], copies[i], activation=activation or None)

    run = through_function if kind == "function" else through_layer
    return Work(
        run,
        len(copies),
        stored.nbytes,
        set_input,
        lambda: run(0).float().numpy(),
        lambda: stored.dequantize(torch.float32).numpy(),
    )


def copy_of(weight: fewbits.QuantizedTensor) -> fewbits.QuantizedTensor:
    """A copy as a loaded model has it, with large codes on large pages."""
    parts = {name: part.clone() for name, part in weight.parts().items()}
    copied = fewbits.QuantizedTensor.from_parts(parts, weight.format, weight.shape, weight.dtype)
    layer = layer_of(copied, fewbits.Scheme(weight.format))
    layer.use_huge_pages()
    return layer.quantized_weight()


def layer_of(weight: fewbits.QuantizedTensor, scheme: fewbits.Scheme) -> QuantLinear:
    rows, columns = weight.shape
    layer = QuantLinear(columns, rows, False, scheme, dtype=weight.dtype)
    layer.store(layer.stored("weight", [weight]))
    return layer.eval()


def dequantize(task: Task) -> Work:
    stored = fewbits.quantize(torch.from_numpy(task.read_weight()).bfloat16(), task.variant)
    # Each result is a fresh tensor, as in use; torch's allocator hands the same memory out again.
    copies = [copy_of(stored) for _ in range(task.copies(stored.nbytes))]
    return Work(lambda i: copies[i].dequantize(torch.bfloat16), len(copies), stored.nbytes)


def quantize(task: Task) -> Work:
    weight = torch.from_numpy(task.read_weight()).bfloat16()
    nbytes = weight.numel() * 2
    copies = [weight.clone() for _ in range(task.copies(nbytes))]
    return Work(lambda i: fewbits.quantize(copies[i], task.variant), len(copies), nbytes)

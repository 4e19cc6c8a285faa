"""torch's own products: oneDNN in bfloat16 and float32, int4pack, int8pack, dynamic int8."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.libraries import RefusedError, Task, Work

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
torch.set_grad_enabled(False)
GROUP = 128  # of int4pack


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def prepare(task: Task) -> Work:
    weight = torch.from_numpy(task.read_weight())
    call, parts, decoded, note = VARIANTS[task.variant](weight)
    nbytes = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor)) or weight.numel()
    copies = [copy.deepcopy(parts) for _ in range(task.copies(nbytes))]
    inputs: list[torch.Tensor] = []

    def set_input(x: np.ndarray) -> None:
        inputs[:] = [torch.from_numpy(x).to(DTYPES[task.x])]

    def run(i: int) -> Any:
        return call(inputs[0], *copies[i])

    return Work(
        run,
        len(copies),
        nbytes,
        set_input,
        lambda: run(0).float().numpy(),
        lambda: decoded.float().numpy(),
        note=note,
    )


Prepared = tuple[Callable[..., torch.Tensor], list[Any], torch.Tensor, str]


def bf16(weight: torch.Tensor) -> Prepared:
    stored = weight.bfloat16()
    return F.linear, [stored], stored, ""


def f32(weight: torch.Tensor) -> Prepared:
    return F.linear, [weight], weight, ""


def int4pack(weight: torch.Tensor) -> Prepared:
    rows, columns = weight.shape
    if columns % GROUP or rows % 16:
        raise RefusedError(f"int4pack needs rows in sixteens and columns in groups of {GROUP}")
    groups = weight.view(rows, -1, GROUP)
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(rows, columns).int(), 1)
    # Per group and row: scale, and the value of code 8.
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
    decoded = ((codes - 8) * scale.bfloat16().float().unsqueeze(-1)).view(rows, columns)

    def call(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, s)

    return call, [packed, scales], decoded, ""


def int8pack(weight: torch.Tensor) -> Prepared:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale.unsqueeze(1)).round().to(torch.int8)
    scale = scale.bfloat16()
    return torch.ops.aten._weight_int8pack_mm, [codes, scale], codes.float() * scale.float().unsqueeze(1), ""


def dynamic_int8(weight: torch.Tensor) -> Prepared:
    source = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    source.weight.data = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of another package
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(source), {torch.nn.Linear})
    layer = model[0]
    return lambda x, w: w(x), [layer], layer.weight().dequantize(), torch.backends.quantized.engine


VARIANTS: dict[str, Callable[[torch.Tensor], Prepared]] = {
    "bf16": bf16,
    "f32": f32,
    "int4pack": int4pack,
    "int8pack": int8pack,
    "dynamic int8": dynamic_int8,
}

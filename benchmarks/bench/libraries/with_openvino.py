"""OpenVINO's CPU plugin: one compiled model for each copy of the weight; its threads are the process's.

`variant`: "i4 dynamic" (int8 activations in groups of 64) or "nf4 exact" (bfloat16 activations).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from bench.libraries import RefusedError, Task, Work

GROUP = 64


def versions() -> dict[str, str]:
    return {"openvino": ov.__version__.split("-")[0]}


def prepare(task: Task) -> Work:
    weight = task.read_weight()
    rows, columns = weight.shape
    if columns % GROUP:
        raise RefusedError(f"its groups of {GROUP} need K divisible by {GROUP}, got {columns}")
    kind, _, way = task.variant.partition(" ")
    values, scale = TYPES[kind](weight.reshape(rows, -1, GROUP))
    nbytes = weight.size // 2 + scale.size * 2
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": task.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if way == "dynamic" else 0,
    }
    count = task.copies(nbytes)
    requests = [
        core.compile_model(model_of(values, scale, kind, columns), "CPU", settings).create_infer_request()
        for _ in range(count)
    ]
    shown: list[Any] = []
    seen: set[int] = set()

    def set_input(x: np.ndarray) -> None:
        shown[:] = [np.ascontiguousarray(x, np.float32)]
        for request in requests:
            request.set_input_tensor(ov.Tensor(shown[0], shared_memory=True))
            if len(x) not in seen:  # packs the weight, and prepares for so many rows
                request.infer(share_outputs=True)
        seen.add(len(x))

    def run(i: int) -> Any:
        requests[i].infer(share_outputs=True)

    def output() -> np.ndarray:
        run(0)
        return np.array(requests[0].get_output_tensor().data, np.float32)

    def decoded() -> np.ndarray:
        levels = NF4[values] if kind == "nf4" else values.astype(np.float32)
        return (levels * scale.astype(np.float32)).reshape(rows, columns)

    return Work(run, count, nbytes, set_input, output, decoded)


def model_of(values: np.ndarray, scale: np.ndarray, kind: str, columns: int) -> ov.Model:
    """x [m, K] → x · (codes · scale)ᵀ, in the shape that the plugin knows as a compressed weight."""
    nibbles = (values & 15).astype(np.uint8).reshape(-1, 2)
    packed = nibbles[:, 0] | nibbles[:, 1] << 4
    tensor = ov.Tensor(getattr(ov.Type, kind), ov.Shape(list(values.shape)))
    tensor.data.reshape(-1)[:] = packed  # a copy: models outlive this function
    codes = opset.convert(opset.constant(tensor), "f16")
    weight = opset.multiply(codes, opset.constant(scale.astype(np.float16)))
    matrix = opset.convert(opset.reshape(weight, [len(values), columns], special_zero=False), "f32")
    x = opset.parameter([-1, columns], np.float32)
    return ov.Model([opset.matmul(x, matrix, transpose_a=False, transpose_b=True)], [x])


def as_int4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values int8 -8 … 7, scale float16 [N, groups, 1])."""
    scale = (np.abs(groups).max(-1, keepdims=True) / 7).astype(np.float16)
    return np.clip(np.rint(groups / scale.astype(np.float32)), -8, 7).astype(np.int8), scale


def as_nf4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8, scale float16 [N, groups, 1])."""
    scale = np.abs(groups).max(-1, keepdims=True).astype(np.float16)
    middles = (NF4[1:] + NF4[:-1]) / 2
    return np.searchsorted(middles, groups / scale.astype(np.float32)).astype(np.uint8), scale


# The values of QLoRA, arXiv 2305.14314, appendix E.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
TYPES = {"i4": as_int4, "nf4": as_nf4}

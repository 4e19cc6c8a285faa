"""ONNX Runtime's MatMulNBits: one session for each copy of the weight, all on one pool of threads.

`variant` is "g64 level4": group size and accuracy level (1: float32 activations, 4: int8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bench.libraries import Task, Work

_pool: list[int] = []


def versions() -> dict[str, str]:
    return {"onnxruntime": ort.__version__}


def prepare(task: Task) -> Work:
    group, level = (int(word.strip("glev")) for word in task.variant.split())
    weight = task.read_weight()
    codes, scale = quantized(weight, group)
    nbytes = codes.nbytes + scale.nbytes
    model = model_of(codes, scale, weight.shape, group, level)
    if not _pool:
        ort.set_global_thread_pool_sizes(task.threads, 1)
        _pool.append(task.threads)
    settings = ort.SessionOptions()
    settings.use_per_session_threads = False
    settings.log_severity_level = 3
    count = task.copies(nbytes)
    sessions = [
        ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"]) for _ in range(count)
    ]
    bindings: list[Any] = []
    result: list[Any] = []

    def set_input(x: np.ndarray) -> None:
        given = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x, np.float32))
        result[:] = [ort.OrtValue.ortvalue_from_numpy(np.empty((len(x), weight.shape[0]), np.float32))]
        bindings.clear()
        for session in sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", given)
            binding.bind_ortvalue_output("y", result[0])
            bindings.append(binding)

    def run(i: int) -> None:
        sessions[i].run_with_iobinding(bindings[i])

    def output() -> np.ndarray:
        run(0)
        return np.array(result[0].numpy())

    return Work(run, count, nbytes, set_input, output, lambda: decoded(codes, scale, weight.shape, group))


def quantized(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [N, groups, group/2], the first of a pair in the low bits; scale float32 [N, groups])."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    # The value of largest magnitude gets the code of largest magnitude, -8, as ONNX Runtime's tool does.
    peak = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)[..., 0]
    scale = np.where(peak == 0, 1, peak / -8).astype(np.float32)
    codes = np.clip(np.rint(padded / scale[..., None]) + 8, 0, 15).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale


def decoded(codes: np.ndarray, scale: np.ndarray, shape: tuple[int, ...], group: int) -> np.ndarray:
    values = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], group).astype(np.float32) - 8
    return np.ascontiguousarray((values * scale[..., None]).reshape(shape[0], -1)[:, : shape[1]])


def model_of(codes: np.ndarray, scale: np.ndarray, shape: tuple[int, ...], group: int, level: int) -> bytes:
    rows, columns = shape
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=group, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale.reshape(-1), "scale")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(onnx.ModelProto.SerializeToString(model))

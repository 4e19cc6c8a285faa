"""llama.cpp's ggml through ctypes, from the libraries that llama-cpp-python builds.

Weights lie in the CPU backend's repacking buffer where ggml has a repacked kernel for their type, as
llama.cpp itself places them. One graph of one product for each copy; all share input and output.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import distribution, version
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from bench.libraries import RefusedError, Task, Work

TYPES = {"q4_0": "Q4_0", "q4_k": "Q4_K", "iq4_nl": "IQ4_NL", "q8_0": "Q8_0"}
REPACKED = ("q4_0", "q4_k", "iq4_nl")
ALIGNMENT = 64


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


P = c_void_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (P, [InitParams]),
    "ggml_free": (None, [P]),
    "ggml_new_tensor_2d": (P, [P, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_new_graph_custom": (P, [P, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_quantize_chunk": (c_size_t, [c_int, P, P, c_int64, c_int64, c_int64, P]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_buft_alloc_buffer": (P, [P, c_size_t]),
    "ggml_backend_buffer_get_base": (P, [P]),
    "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_tensor_alloc": (c_int, [P, P, P]),
    "ggml_backend_tensor_set": (None, [P, P, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [P, P, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [P, P]),
    "ggml_backend_reg_dev_get": (P, [P, c_size_t]),
    "ggml_backend_reg_get_proc_address": (P, [P, c_char_p]),
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, c_int]),
    "ggml_backend_cpu_buffer_type": (P, []),
    "ggml_backend_cpu_reg": (P, []),
}
NODES = 8  # room in a graph


class Ggml:
    """The functions above, found in whichever of ggml's libraries has them."""

    def __init__(self) -> None:
        files = [distribution("llama-cpp-python").locate_file(f"llama_cpp/lib/libggml{part}.so")
                 for part in ("-base", "-cpu", "")]  # fmt: skip
        libraries = [ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL) for file in files]
        for name, (result, arguments) in SIGNATURES.items():
            function = next((getattr(one, name) for one in libraries if hasattr(one, name)), None)
            if function is None:
                raise RefusedError(f"this llama-cpp-python has no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.cpu = self.backend_cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self, size: int) -> int:
        return int(self.init(InitParams(size, None, True)))

    def repacking(self) -> int | None:
        """The buffer type that repacks, as llama.cpp finds it; None: this build has none."""
        registry = self.backend_cpu_reg()
        found = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not found:
            return None
        list_them = ctypes.CFUNCTYPE(POINTER(P), P)(found)
        types = list_them(self.backend_reg_dev_get(registry, 0))
        # A list that ends with null; the last entry is the repacking one (others are for AMX and the like).
        last, i = None, 0
        while types and types[i]:
            last, i = types[i], i + 1
        return last


GGML = Ggml()


def versions() -> dict[str, str]:
    return {"llama-cpp-python": version("llama-cpp-python")}


def prepare(task: Task) -> Work:
    weight = np.ascontiguousarray(task.read_weight())
    kind = GGMLQuantizationType[TYPES[task.variant]]
    rows, columns = weight.shape
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if columns % block:
        raise RefusedError(f"{TYPES[task.variant]} needs K divisible by {block}, got {columns}")
    stored = np.empty(rows * GGML.row_size(int(kind), columns), np.uint8)
    GGML.quantize_chunk(int(kind), weight.ctypes.data, stored.ctypes.data, 0, rows, columns, None)
    buffer_type = GGML.repacking() if task.variant in REPACKED and rows % 8 == 0 else None
    copies = place(stored, int(kind), rows, columns, task.copies(stored.nbytes), buffer_type)
    GGML.backend_cpu_set_n_threads(GGML.cpu, task.threads)
    products = Products(copies, rows, columns)
    decoded = lambda: gguf.quants.dequantize(stored.reshape(rows, -1), kind)  # noqa: E731
    note = "repacked" if buffer_type else ""
    return Work(
        products.run, len(copies), stored.nbytes, products.set_input, products.output, decoded, note=note
    )


def place(
    stored: np.ndarray, kind: int, rows: int, columns: int, count: int, buffer_type: int | None
) -> list[int]:
    """Tensors with the stored weight, each with memory of its own. Never freed: the process ends soon."""
    context = GGML.context(GGML.tensor_overhead() * (count + 1))
    tensors = [GGML.new_tensor_2d(context, kind, columns, rows) for _ in range(count)]
    if not GGML.backend_alloc_ctx_tensors_from_buft(context, buffer_type or GGML.backend_cpu_buffer_type()):
        raise RefusedError("ggml could not allocate the weights")
    for tensor in tensors:
        GGML.backend_tensor_set(tensor, stored.ctypes.data, 0, stored.nbytes)
    return tensors


class Products:
    """One graph for each copy of a weight, rebuilt for every input."""

    def __init__(self, weights: list[int], rows: int, columns: int) -> None:
        self.weights, self.rows, self.columns, self.m = weights, rows, columns, 0
        self.context = self.buffer = None
        self.graphs: list[int] = []
        self.first_output = 0

    def set_input(self, x: np.ndarray) -> None:
        if self.context:
            GGML.free(self.context)
            GGML.backend_buffer_free(self.buffer)
        self.m, count = len(x), len(self.weights)
        each = GGML.tensor_overhead() * 2 + GGML.graph_overhead_custom(NODES, False) + 1024
        self.context = GGML.context(each * (count + 1))
        size = -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        self.buffer = GGML.backend_buft_alloc_buffer(
            GGML.backend_cpu_buffer_type(), size + self.m * self.rows * 4 + 2 * ALIGNMENT
        )
        base = GGML.backend_buffer_get_base(self.buffer)
        given = GGML.new_tensor_2d(self.context, int(GGMLQuantizationType.F32), self.columns, self.m)
        GGML.backend_tensor_alloc(self.buffer, given, base)
        self.graphs = []
        for number, weight in enumerate(self.weights):
            product = GGML.mul_mat(self.context, weight, given)
            GGML.backend_tensor_alloc(self.buffer, product, base + size)
            graph = GGML.new_graph_custom(self.context, NODES, False)
            GGML.build_forward_expand(graph, product)
            self.graphs.append(graph)
            self.first_output = product if number == 0 else self.first_output
        values = np.ascontiguousarray(x, np.float32)
        GGML.backend_tensor_set(given, values.ctypes.data, 0, values.nbytes)

    def run(self, i: int) -> None:
        if GGML.backend_graph_compute(GGML.cpu, self.graphs[i]):
            raise RuntimeError("ggml did not compute the graph")

    def output(self) -> np.ndarray:
        self.run(0)
        y = np.empty((self.m, self.rows), np.float32)
        GGML.backend_tensor_get(self.first_output, y.ctypes.data, 0, y.nbytes)
        return y

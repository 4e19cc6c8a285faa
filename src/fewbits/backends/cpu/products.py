"""Products with quantized weights on the CPU: fused kernels for few rows, panels of decoded rows for many.

A panel is a part of the weight, decoded into memory that stays in the cache and multiplied by torch's own
matrix product, which comes close to the peak of the machine. There is never a decoded copy of a whole layer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fewbits import reference
from fewbits.backends.cpu import library
from fewbits.backends.cpu.structs import DTYPES, Product, Weight, dense, describe
from fewbits.format import Format, Scheme
from fewbits.tensor import QuantizedTensor

PANEL_BYTES = 2**23
"""Of decoded weights at a time: they stay in the last cache, and are enough rows for an efficient product."""
_UNSUPPORTED = 4  # FEWBITS_UNSUPPORTED of csrc/api.h
# Instruction sets with a product of bfloat16 in hardware, which torch's own product uses as well.
_BF16_PRODUCTS = ("avx512_bf16", "neon_bf16")
# From so many rows of x on, panels are faster than the fused kernels (docs/benchmarks.md): exact products in
# the dtype of the panel, by instruction set.
_PANELS_FROM = {
    ("avx512_bf16", torch.bfloat16): 224,
    ("avx512_bf16", torch.float32): 640,
    ("avx512", torch.float32): 640,
    ("avx2", torch.float32): 128,
}
_PANELS_FROM_ELSEWHERE = 12


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x [..., in] · decode(weight [out, in])ᵀ + bias [out], in x's dtype."""
    if x.dtype not in DTYPES:
        return reference.linear(x, weight, bias)
    weight = dense(weight)
    rows = math.prod(x.shape[:-1])
    if rows < _panels_from(_panel_dtype(x.dtype)) and _is_fused(weight.format, weight.shape):
        y = _product("fewbits_linear", x, weight, bias)
        if y is not None:
            return y
    return _linear_by_panels(x, weight, bias)


def linear_backward(grad: Tensor, weight: QuantizedTensor) -> Tensor:
    """grad [..., out] · decode(weight [out, in]): the gradient of `linear` for its input."""
    if grad.dtype not in DTYPES:
        return reference.linear_backward(grad, weight)
    weight, dtype = dense(weight), _panel_dtype(grad.dtype)
    rows, result = _rows(grad).to(dtype), _result(grad, weight.shape[1])
    matrix = result.view(len(rows), weight.shape[1])
    # Panels of columns: every sum over the rows of the weight is taken at once, and rounded once.
    for columns, panel in _panels(weight, dtype, across=True):
        matrix[:, columns] = rows @ panel
    return result


def linear_int8(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): x [..., in] times weight [out, in] in int8:row, plus bias [out]."""
    if x.dtype not in DTYPES:
        return reference.linear_int8(x, weight, bias, threshold)
    y = _product("fewbits_linear_int8", x, dense(weight), bias, threshold)
    if y is None:  # no columns, or more than 32 bits can sum
        return reference.linear_int8(x, weight, bias, threshold)
    return y


def linear_a8(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, group: int) -> Tensor:
    """x [..., in], quantized to int8 in groups of columns (0: rows), times decode(weight [out, in])ᵀ."""
    weight = dense(weight)
    if x.dtype in DTYPES and _is_fused(weight.format, weight.shape):
        y = _product("fewbits_linear_a8", x, weight, bias, group)
        if y is not None:
            return y
    return linear(reference.rounded_to_int8(x, group), weight, bias)


def fixed_linear(
    weight: QuantizedTensor, bias: Tensor | None, scheme: Scheme
) -> Callable[[Tensor], Tensor | None] | None:
    """x → y for a few rows of x, or None; see `fewbits.ops.fixed_linear`."""
    activation = scheme.activation
    parts = list(weight.parts().values()) + ([] if bias is None else [bias])
    if dense(weight) is not weight or not all(part.is_cpu and part.is_contiguous() for part in parts):
        return None
    if not scheme.is_llm_int8 and not _is_fused(weight.format, weight.shape):
        return None
    struct, loaded = describe(weight), library.library()
    function: Callable[..., int] = loaded.fewbits_linear
    more: tuple[float, ...] = ()
    if activation is not None:
        function = loaded.fewbits_linear_int8 if scheme.is_llm_int8 else loaded.fewbits_linear_a8
        more = (activation.threshold if scheme.is_llm_int8 else activation.group,)
    out, columns = weight.shape
    bias_place = None if bias is None else bias.data_ptr()
    bias_dtype = 0 if bias is None else DTYPES.get(bias.dtype)
    if bias_dtype is None:
        return None
    limits = {dtype: _panels_from(_panel_dtype(dtype)) if activation is None else 2**31 for dtype in DTYPES}

    def product(x: Tensor) -> Tensor | None:
        dtype = DTYPES.get(x.dtype)
        if dtype is None or not columns or x.shape[-1] != columns or not x.is_contiguous():
            return None
        count = x.numel() // columns
        if count >= limits[x.dtype]:
            return None
        y = x.new_empty(*x.shape[:-1], out)
        given = Product(
            x.data_ptr(), count, columns, y.data_ptr(), out, bias_place, dtype, dtype, bias_dtype,
            torch.get_num_threads(),
        )  # fmt: skip
        return None if function(struct, given, *more) else y

    return product


def _rows(x: Tensor) -> Tensor:
    """x as a dense matrix [rows, columns]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _result(x: Tensor, columns: int) -> Tensor:
    """[..., columns] for x [..., any], to be written; no view: autograd lets nobody change those in place."""
    return x.new_empty(*x.shape[:-1], columns)


# Formats and shapes that the fused kernels said they do not multiply.
_refused: set[tuple[Format, torch.Size]] = set()


def _is_fused(format: Format, shape: torch.Size) -> bool:
    return format.codebook.bits <= 4 and not format.offset and (format, shape) not in _refused


def _product(
    function: str, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, *more: float
) -> Tensor | None:
    """y of a fused kernel, or None where there is none for this weight."""
    rows, y = _rows(x), _result(x, weight.shape[0])
    if bias is not None and (bias.dtype not in DTYPES or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    product = Product(
        rows.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        y.data_ptr(),
        y.shape[-1],
        None if bias is None else bias.data_ptr(),
        DTYPES[x.dtype],
        DTYPES[y.dtype],
        0 if bias is None else DTYPES[bias.dtype],
        torch.get_num_threads(),
    )
    status = getattr(library.library(), function)(describe(weight), product, *more)
    if status == _UNSUPPORTED:
        _refused.add((weight.format, weight.shape))
        return None
    library.check(status, f"cannot multiply with a weight {list(weight.shape)} in {weight.format}")
    return y


# --- panels -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _instruction_set() -> str:
    return next(name for name, state in library.instruction_sets().items() if state == "used")


def _panel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What panels are decoded to: x's dtype where the machine multiplies it, else float32."""
    has_bf16 = dtype == torch.bfloat16 and _instruction_set() in _BF16_PRODUCTS
    return torch.bfloat16 if has_bf16 else torch.float32


@lru_cache(maxsize=16)
def _panels_from(dtype: torch.dtype) -> int:
    return _PANELS_FROM.get((_instruction_set(), dtype), _PANELS_FROM_ELSEWHERE)


def _linear_by_panels(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    dtype, result = _panel_dtype(x.dtype), _result(x, weight.shape[0])
    given, bias = _rows(x).to(dtype), None if bias is None else bias.to(dtype)
    matrix = result.view(len(given), weight.shape[0])
    for rows, panel in _panels(weight, dtype):
        part = None if bias is None else bias[rows]
        matrix[:, rows] = torch.nn.functional.linear(given, panel, part)
    return result


def _panels(
    weight: QuantizedTensor, dtype: torch.dtype, across: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, [rows, in]) of all rows in turn, decoded; `across`: (columns, [out, columns]).

    Panels share memory: each is gone when the next comes.
    """
    size, other = (weight.shape[1], weight.shape[0]) if across else tuple(weight.shape)
    step = max(64, min(size, PANEL_BYTES // max(other * dtype.itemsize, 1) // 64 * 64))
    memory = _panel_memory(min(step, size) * other, dtype)
    struct, decode = describe(weight), library.library().fewbits_dequantize
    for start in range(0, size, step):
        count = min(step, size - start)
        rows, columns = (0, weight.shape[0]), (start, count)
        if not across:
            rows, columns = (start, count), (0, weight.shape[1])
        panel = memory[: rows[1] * columns[1]].view(rows[1], columns[1])
        _decode(decode, struct, rows, columns, panel)
        yield slice(start, start + count), panel


# Each thread's, kept: the C library would give memory of this size back to the system after every product.
_kept = threading.local()


def _panel_memory(elements: int, dtype: torch.dtype) -> Tensor:
    if elements * dtype.itemsize > PANEL_BYTES:
        return torch.empty(elements, dtype=dtype, device="cpu")
    if not hasattr(_kept, "panel"):
        with torch.inference_mode(mode=False):  # it outlives the mode of this call
            _kept.panel = torch.empty(PANEL_BYTES, dtype=torch.uint8, device="cpu")
    memory: Tensor = _kept.panel[: elements * dtype.itemsize].view(dtype)
    return memory


def _decode(
    decode: Callable[..., int], struct: Weight, rows: tuple[int, int], columns: tuple[int, int], panel: Tensor
) -> None:
    place = (panel.data_ptr(), panel.numel(), panel.shape[1], DTYPES[panel.dtype], torch.get_num_threads())
    if panel.numel():
        library.check(decode(struct, None, *rows, *columns, *place), "cannot decode a panel")

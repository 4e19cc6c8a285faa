"""Quantize, dequantize and look up embeddings with the CPU library, bit for bit as `fewbits.reference`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits import reference
from fewbits.backends.cpu import library
from fewbits.backends.cpu.structs import DTYPES, FLOAT64, dense, describe, encoding
from fewbits.format import Format
from fewbits.tensor import DTYPES as PART_DTYPES
from fewbits.tensor import QuantizedTensor


class _BadValuesError(Exception):
    """The values cannot be represented; the reference says which and why."""


def quantize(weight: Tensor, format: Format, name: str = "tensor") -> QuantizedTensor:
    """Nearest codes for `weight` (any rank, stride and floating dtype); errors as of the reference."""
    if not weight.is_floating_point() or not weight.numel():
        return reference.quantize(weight, format, name)
    try:
        return _quantize(weight.detach(), format)
    except _BadValuesError:
        return reference.quantize(weight, format, name)  # raises


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weights [*shape] in `dtype`."""
    decoded = _empty(weight.shape, dtype if dtype in DTYPES else torch.float32)
    if decoded.numel():
        weight = dense(weight)
        struct = describe(weight)
        status = library.library().fewbits_dequantize(
            struct, None, 0, struct.rows, 0, struct.columns, *_matrix(decoded, struct.columns)
        )
        library.check(status, f"cannot dequantize {weight.format}")
    return decoded.to(dtype)


def embedding(indices: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Rows `indices` [...] of weight [rows, columns] → [..., columns] in `dtype`; decodes only those."""
    columns = weight.shape[-1]
    shape = torch.Size((*indices.shape, columns))
    decoded = _empty(shape, dtype if dtype in DTYPES else torch.float32)
    if decoded.numel():
        weight = dense(weight)
        wanted = indices.to(torch.int64).contiguous()
        status = library.library().fewbits_dequantize(
            describe(weight), wanted.data_ptr(), 0, wanted.numel(), 0, columns, *_matrix(decoded, columns)
        )
        if status:
            reference.embedding(indices, weight, dtype)  # raises for indices beyond the rows
        library.check(status, f"cannot look up rows of {weight.format}")
    return decoded.to(dtype)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # wherever new tensors go by default


def _matrix(out: Tensor, columns: int) -> tuple[int, int, int, int, int]:
    """out, out_elements, out_stride, dtype and threads of `fewbits_dequantize`."""
    return out.data_ptr(), out.numel(), columns, DTYPES[out.dtype], torch.get_num_threads()


def _quantize(weight: Tensor, format: Format) -> QuantizedTensor:
    shape, dtype = weight.shape, weight.dtype
    offset = None
    if format.offset:
        offset = _mean(weight)
        weight = weight.float() - offset
    values = (weight if weight.dtype in DTYPES else weight.float()).contiguous()
    made = {
        part.name: _empty(part.shape, PART_DTYPES[part.dtype])
        for part in format.parts(shape)
        if "scale." not in part.name
    }
    scale: Tensor | QuantizedTensor
    if not isinstance(format.scale, Format):
        scale = made["scale"]
        _encode(values, format, scale, made["codes"], made.get("zero"))
    else:
        exact = _empty(format.group.grid(shape), torch.float32)
        before = format.codes_before_scale
        _encode(values, format, exact, made["codes"] if before else None, made.get("zero"))
        scale = _quantize(exact, format.scale)
        if not before:
            _encode(
                values, format, dequantize(scale, torch.float32), made["codes"], made.get("zero"), given=True
            )
    return QuantizedTensor(made["codes"], scale, format, shape, made.get("zero"), offset, dtype)


def _encode(
    values: Tensor,
    format: Format,
    scale: Tensor,
    codes: Tensor | None,
    zero: Tensor | None,
    given: bool = False,
) -> None:
    """Fill `scale` (or read it when it is `given`), and `codes` and `zero` where there are any."""
    status = library.library().fewbits_quantize(
        encoding(format, tuple(values.shape)),
        values.data_ptr(),
        values.numel(),
        DTYPES[values.dtype],
        *((scale.data_ptr(), scale.numel(), None, 0) if given else (None, 0, scale.data_ptr(), scale.nbytes)),
        *_buffer(zero),
        *_buffer(codes),
        torch.get_num_threads(),
    )
    if status == library.BAD_VALUES:
        raise _BadValuesError
    library.check(status, f"cannot quantize to {format}")


def _buffer(part: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if part is None else (part.data_ptr(), part.nbytes)


def _mean(values: Tensor) -> Tensor:
    """float32 [1], summed in the reference's order."""
    dense = (values if values.dtype == torch.float64 else values.float()).contiguous()
    mean = ctypes.c_float()
    number = FLOAT64 if dense.dtype == torch.float64 else DTYPES[dense.dtype]
    status = library.library().fewbits_mean(dense.data_ptr(), dense.numel(), number, ctypes.byref(mean))
    library.check(status, "cannot take the mean")
    return torch.tensor([mean.value])

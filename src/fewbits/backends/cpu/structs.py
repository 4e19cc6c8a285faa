"""The structs of csrc/api.h, and how a QuantizedTensor and a Format are told in them."""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from fewbits.codebook import CODEBOOKS, Codebook, f32
from fewbits.format import Format, matrix_shape
from fewbits.tensor import QuantizedTensor

# Numbers of csrc/api.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOAT64 = 3
_TABLE, _UNSIGNED, _SIGNED = 0, 1, 2
ROWS, FLAT = 0, 1
_SCALES = {"f32": 0, "f16": 1, "bf16": 2, "e8m0": 3}
_NESTED = 4

# A model has a few thousand weights; many more come from weights that are gone.
_REMEMBERED = 1 << 16


class Weight(ctypes.Structure):
    """`fewbits_weight`."""


Weight._fields_ = [
    ("codes", c_void_p),
    ("codes_bytes", c_int64),
    ("rows", c_int64),
    ("columns", c_int64),
    ("group_rows", c_int64),
    ("group_columns", c_int64),
    ("table", c_void_p),
    ("scale", c_void_p),
    ("scale_bytes", c_int64),
    ("nested", POINTER(Weight)),
    ("zero", c_void_p),
    ("zero_bytes", c_int64),
    ("offset", c_void_p),
    ("unit", c_float),
    ("middle", c_int32),
    ("bits", c_int32),
    ("kind", c_int32),
    ("layout", c_int32),
    ("high_first", c_int32),
    ("flat_groups", c_int32),
    ("scale_type", c_int32),
]


class Encoding(ctypes.Structure):
    """`fewbits_encoding`."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("group_rows", c_int64),
        ("group_columns", c_int64),
        ("thresholds", c_void_p),
        ("order", c_void_p),
        ("threshold_count", c_int64),
        ("peak", c_float),
        ("limit", c_float),
        ("bits", c_int32),
        ("kind", c_int32),
        ("low", c_int32),
        ("high", c_int32),
        ("middle", c_int32),
        ("layout", c_int32),
        ("flat_groups", c_int32),
        ("sign_bit", c_int32),
        ("reciprocal", c_int32),
        ("stores_absmax", c_int32),
        ("scale_type", c_int32),
        ("peak_exponent", c_int32),
        ("has_zero", c_int32),
    )


class Product(ctypes.Structure):
    """`fewbits_product`."""

    _fields_ = (
        ("x", c_void_p),
        ("m", c_int64),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("bias", c_void_p),
        ("x_dtype", c_int32),
        ("y_dtype", c_int32),
        ("bias_dtype", c_int32),
        ("threads", c_int32),
    )


class Moments(ctypes.Structure):
    """`fewbits_moments`."""

    _fields_ = (
        ("param", c_void_p),
        ("grad", c_void_p),
        ("first", c_void_p),
        ("second", c_void_p),
        ("first_scale", c_void_p),
        ("second_scale", c_void_p),
        ("count", c_int64),
        ("param_dtype", c_int32),
        ("grad_dtype", c_int32),
    )


class StepOf(ctypes.Structure):
    """`fewbits_step`."""

    _fields_ = (
        ("first_table", c_void_p),
        ("second_table", c_void_p),
        ("beta1", c_float),
        ("take1", c_float),
        ("beta2", c_float),
        ("take2", c_float),
        ("eps", c_float),
        ("root_factor", c_float),
        ("limit", c_float),
        ("rate", c_float),
        ("shrink", c_float),
        ("decay", c_float),
        ("seed", c_uint32),
        ("rule", c_int32),
        ("threads", c_int32),
    )


@dataclass(frozen=True)
class _Described:
    """A struct, and what its pointers lead to that is not a tensor's; `format` keeps its id from reuse."""

    weight: Weight
    nested: Weight | None
    format: Format


_described: dict[tuple[object, ...], _Described] = {}


def describe(weight: QuantizedTensor) -> Weight:
    """`weight` as the library takes it; its parts are dense CPU tensors (see `dense`).

    The struct is remembered by the addresses of the parts, the format and the shape, which are all that it
    holds: it is right for other tensors at the same addresses, and keeps none alive.
    """
    scale = weight.scale
    key: tuple[object, ...] = (
        id(weight.format),
        weight.shape,
        weight.codes.data_ptr(),
        scale.data_ptr() if isinstance(scale, Tensor) else _addresses(scale),
        None if weight.zero is None else weight.zero.data_ptr(),
        None if weight.offset is None else weight.offset.data_ptr(),
    )
    found = _described.get(key)
    if found is None:
        if len(_described) >= _REMEMBERED:
            _described.clear()
        found = _described[key] = _describe(weight)
    return found.weight


def dense(weight: QuantizedTensor) -> QuantizedTensor:
    """The same where every part is contiguous and on its natural address; ValueError if one is elsewhere."""
    if all(_is_dense(part) for part in _parts(weight)):
        return weight
    parts = {name: _made_dense(name, part) for name, part in weight.parts().items()}
    return QuantizedTensor.from_parts(parts, weight.format, weight.shape, weight.dtype)


def encoding(format: Format, shape: tuple[int, ...]) -> Encoding:
    """How values of `shape` become codes of `format`; nested scales are float32 here."""
    return _encoding(format, matrix_shape(shape))


def _addresses(weight: QuantizedTensor) -> tuple[int, ...]:
    return tuple(part.data_ptr() for part in _parts(weight))


def _parts(weight: QuantizedTensor) -> list[Tensor]:
    """All stored tensors; a list is built faster than `parts()`."""
    found = [weight.codes]
    if isinstance(weight.scale, Tensor):
        found.append(weight.scale)
    else:
        found += _parts(weight.scale)
    if weight.zero is not None:
        found.append(weight.zero)
    if weight.offset is not None:
        found.append(weight.offset)
    return found


def _is_dense(part: Tensor) -> bool:
    return part.is_contiguous() and part.is_cpu and part.data_ptr() % part.itemsize == 0


def _made_dense(name: str, part: Tensor) -> Tensor:
    if not part.is_cpu:
        raise ValueError(f"{name} of a weight on the CPU is on {part.device}; move it there")
    return part if _is_dense(part) else part.clone(memory_format=torch.contiguous_format)


def _describe(weight: QuantizedTensor) -> _Described:
    format, book = weight.format, weight.format.codebook
    rows, columns = matrix_shape(weight.shape)
    group = format.group
    nested = _describe(weight.scale) if isinstance(weight.scale, QuantizedTensor) else None
    struct = Weight(
        codes=weight.codes.data_ptr() or None,
        codes_bytes=weight.codes.nbytes,
        rows=rows,
        columns=columns,
        group_rows=group.rows or max(rows, 1),
        group_columns=group.columns or max(columns, 1),
        table=ctypes.addressof(_table(book.name)) if book.values else None,
        middle=book.middle if book.integer else 0,
        unit=book.unit,
        bits=book.bits,
        kind=_kind(book),
        layout=FLAT if group.flat else ROWS,
        high_first=group.flat,
        flat_groups=group.flat,
        scale_type=_NESTED if isinstance(format.scale, Format) else _SCALES[format.scale],
    )
    if isinstance(weight.scale, Tensor):
        struct.scale, struct.scale_bytes = weight.scale.data_ptr() or None, weight.scale.nbytes
    elif nested is not None:
        struct.nested = ctypes.pointer(nested.weight)
    if weight.zero is not None:
        struct.zero, struct.zero_bytes = weight.zero.data_ptr() or None, weight.zero.nbytes
    if weight.offset is not None:
        struct.offset = weight.offset.data_ptr()
    return _Described(struct, nested.weight if nested else None, format)


def _kind(book: Codebook) -> int:
    return _TABLE if book.values else _SIGNED if book.signed else _UNSIGNED


@lru_cache(maxsize=1024)
def _encoding(format: Format, shape: tuple[int, int]) -> Encoding:
    book, group = format.codebook, format.group
    rows, columns = shape
    in_order = book.order == tuple(range(len(book.order)))
    return Encoding(
        rows=rows,
        columns=columns,
        group_rows=group.rows or max(rows, 1),
        group_columns=group.columns or max(columns, 1),
        thresholds=ctypes.addressof(_thresholds(book.name)) if book.values else None,
        order=None if in_order else ctypes.addressof(_order(book.name)),
        threshold_count=len(book.thresholds),
        peak=book.peak,
        # As reference.quantize: decoding multiplies with a stored absolute maximum first, and a range is
        # twice as wide.
        limit=f32(torch.finfo(torch.float32).max * book.unit / (2 if format.zero else 1)),
        bits=book.bits,
        kind=_kind(book),
        low=book.low if book.integer else 0,
        high=book.high if book.integer else 0,
        middle=book.middle if book.integer else 0,
        layout=FLAT if group.flat else ROWS,
        flat_groups=group.flat,
        sign_bit=book.sign_bit,
        reciprocal=book.reciprocal,
        stores_absmax=book.unit != 1 or format.scale == "e8m0",
        scale_type=_SCALES[format.scale] if isinstance(format.scale, str) else _SCALES["f32"],
        peak_exponent=math.frexp(book.peak)[1],
        has_zero=format.zero,
    )


def table_address(book: Codebook) -> int:
    """Where the values of a codebook lie, in float32, as long as the process lives."""
    return ctypes.addressof(_table(book.name))


# Arrays live as long as the process: structs hold their addresses.
@cache
def _table(name: str) -> ctypes.Array[c_float]:
    values = CODEBOOKS[name].values
    return (c_float * len(values))(*values)


@cache
def _thresholds(name: str) -> ctypes.Array[c_float]:
    thresholds = CODEBOOKS[name].thresholds
    return (c_float * len(thresholds))(*thresholds)


@cache
def _order(name: str) -> ctypes.Array[c_uint8]:
    order = CODEBOOKS[name].order
    return (c_uint8 * len(order))(*order)

"""Quantize, dequantize and multiply in plain torch: the specification that every kernel is held to.

Arithmetic is float32 and rounds to the output dtype once. Work is done in blocks of rows, so that
temporaries stay small whatever the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.codebook import Codebook
from fewbits.format import Format, Group, matrix_shape, packed_length
from fewbits.packing import bit_order, pack, unpack
from fewbits.tensor import DTYPES, QuantizedTensor

_BLOCK = 2**19  # weights worked on at a time
_TINY = 1e-38  # stands in for an absolute maximum of 0 as the divisor


def quantize(weight: Tensor, format: Format, name: str = "tensor") -> QuantizedTensor:
    """Nearest codes for `weight` (any rank, stride and floating dtype).

    Scales map the largest magnitude of a group to the codebook's peak (symmetric), or the range from
    min(0, smallest) to max(0, largest) to all codes (zero points). ValueError, naming `name`, for NaN
    and infinity, and for scales that do not fit their dtype.
    """
    if not weight.is_floating_point():
        raise ValueError(f"{name}: only floating tensors are quantized, got {weight.dtype}")
    shape, source = weight.shape, weight.dtype
    if not weight.numel():
        parts = [
            torch.zeros(p.shape, dtype=DTYPES[p.dtype], device=weight.device) for p in format.parts(shape)
        ]
        return QuantizedTensor.from_parts(parts, format, shape, source)
    offset = None
    if format.offset:
        offset = _mean(weight)
        weight = weight.float() - offset
    pieces = [_quantize_matrix(piece, format, name) for piece in _pieces(weight, format.group)]
    grid = format.group.grid(shape)
    scale = torch.cat([scale.flatten() for _, scale, _ in pieces]).reshape(grid)
    codes, scales, zeros = _encode_pieces(pieces, scale, format, name)
    codes = codes.reshape(format.parts(shape)[0].shape)
    return QuantizedTensor(codes, scales, format, shape, zeros, offset, source)


def _mean(values: Tensor) -> Tensor:
    """The mean, float32 [1], the same for any number of threads and any vector width.

    Summed in float64 by 64 columns, row after row, and then column after column.
    """
    padding = -values.numel() % 64
    columns = torch.nn.functional.pad(values.flatten().double(), (0, padding)).view(-1, 64)
    total = columns.cumsum(0)[-1].cumsum(0)[-1:]
    return (total / values.numel()).float()


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weights [*shape] in `dtype`."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not result.numel():
        return result
    scale = _decoded_scale(weight)
    group = weight.format.group
    if group.flat:
        flat, codes = result.view(-1), weight.codes.view(-1)
        step = group.columns * max(1, _BLOCK // group.columns)
        bits = weight.format.codebook.bits
        for start in range(0, flat.numel(), step):
            stop = min(start + step, flat.numel())
            piece = codes[start * bits // 8 : packed_length(stop, bits)]
            scales = scale[start // group.columns : -(-stop // group.columns)]
            scales = scales.repeat_interleave(group.columns)[: stop - start]
            flat[start:stop] = _decode(unpack(piece, bits, stop - start, "high_first"), scales, None, weight)
        return result
    rows, columns = matrix_shape(weight.shape)
    matrix = result.view(rows, columns)
    zeros = _unpacked_zeros(weight)
    for block in _row_blocks(rows, columns):
        codes = unpack(weight.codes[block], weight.format.codebook.bits, columns)
        matrix[block] = _decode(
            codes,
            _spread(scale, group, block, (rows, columns)),
            None if zeros is None else _spread(zeros, group, block, (rows, columns)),
            weight,
        )
    return result


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x [..., in] · decode(weight [out, in])ᵀ + bias [out], in x's dtype."""
    decoded = dequantize(weight, x.dtype)
    return torch.nn.functional.linear(x, decoded, None if bias is None else bias.to(x.dtype))


def linear_backward(grad: Tensor, weight: QuantizedTensor) -> Tensor:
    """grad [..., out] · decode(weight [out, in]): the gradient of `linear` for its input."""
    return grad @ dequantize(weight, grad.dtype)


def linear_int8(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): x [..., in] times weight [out, in] in int8:row, plus bias [out].

    Rows of x are quantized to int8 with their absolute maximum. Columns of x with a magnitude of
    `threshold` or more (0: none) are taken out and multiplied in x's dtype with decoded weights. The int8
    product is exact; all sums meet in float32, which is rounded to x's dtype once.
    """
    rows = x.reshape(-1, x.shape[-1])
    values = rows.float()
    outliers = torch.zeros(values.shape[-1], dtype=torch.bool, device=x.device)
    inliers = values
    if threshold > 0:
        is_outlier = values.abs() >= threshold
        outliers = is_outlier.any(0)
        inliers = values.masked_fill(is_outlier, 0.0)
    absmax = _absmax(inliers)
    book = weight.format.codebook
    codes = torch.round(inliers * _reciprocal(book, absmax)).masked_fill(outliers, 0.0)
    scale = _decoded_scale(weight).view(1, -1)
    y = _exact_product(codes, weight.codes).float() * (absmax * scale) * (1 / 127**2)
    columns = outliers.nonzero().view(-1)
    if len(columns):
        picked = (weight.codes[:, columns].float() * scale.view(-1, 1) * book.unit).to(x.dtype)
        y += values[:, columns] @ picked.float().T
    if bias is not None:
        y += bias.float()
    # Not a view of y: autograd forbids changing the output of an op in place if it is a view.
    result = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    result.view(y.shape).copy_(y)
    return result


def linear_a8(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, group: int) -> Tensor:
    """x [..., in], rounded to int8 (see `rounded_to_int8`), times decode(weight [out, in])ᵀ, plus bias [out].

    Kernels multiply the codes of x with the codebook rounded to int8.
    """
    return linear(rounded_to_int8(x, group), weight, bias)


def rounded_to_int8(x: Tensor, group: int) -> Tensor:
    """x [..., in] as int8 activations stand for it, in its dtype: multiples of absmax / 127.

    The absmax is that of each run of `group` columns of a row, or of the row where `group` is 0.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    width = group or max(rows.shape[-1], 1)
    runs = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % width)).unflatten(-1, (-1, width))
    absmax = runs.abs().amax(-1, keepdim=True)
    codes = torch.round(runs * (127 / absmax.clamp(min=_TINY * 127))).clamp(-127, 127)
    rounded: Tensor = (codes * (absmax / 127)).flatten(-2)[:, : rows.shape[-1]]
    return rounded.reshape(x.shape).to(x.dtype)


def embedding(indices: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Rows `indices` [...] of weight [rows, columns] → [..., columns] in `dtype`; decodes only those."""
    wanted, columns = indices.reshape(-1), weight.shape[-1]
    if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < weight.shape[0]):
        reach = f"{int(wanted.min())} … {int(wanted.max())}"
        raise IndexError(f"indices {reach} do not fit an embedding of {weight.shape[0]} rows")
    format, scale = weight.format, _decoded_scale(weight)
    if format.group.flat:
        places = wanted.view(-1, 1) * columns + torch.arange(columns, device=wanted.device)
        codes = _codes_at(weight.codes.view(-1), places, format)
        decoded = _decode(codes, scale[places // format.group.columns], None, weight)
    else:
        zeros = _unpacked_zeros(weight)
        codes = unpack(weight.codes[wanted], format.codebook.bits, columns)
        shape = (weight.shape[0], columns)
        decoded = _decode(
            codes,
            _spread(scale, format.group, wanted, shape),
            None if zeros is None else _spread(zeros, format.group, wanted, shape),
            weight,
        )
    return decoded.to(dtype).view(*indices.shape, columns)


# --- scales -----------------------------------------------------------------------------------------


def _pieces(weight: Tensor, group: Group) -> list[Tensor]:
    """The matrices that groups run over: the tensor, or flat groups as rows and a last, shorter one."""
    if not group.flat:
        return [weight.reshape(matrix_shape(weight.shape))]
    flat = weight.reshape(-1)
    whole = flat.numel() // group.columns * group.columns
    pieces = [flat[:whole].view(-1, group.columns), flat[whole:].view(1, -1)]
    return [piece for piece in pieces if piece.numel()]


def _quantize_matrix(matrix: Tensor, format: Format, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(matrix, float32 scale per group, zero points per group or None)."""
    group = Group(1, 0) if format.group.flat else format.group
    low, high = _ranges(matrix, group)
    book = format.codebook
    # Decoding multiplies codes with a stored absolute maximum first; a range is twice as wide.
    limit = torch.finfo(torch.float32).max * book.unit / (2 if format.zero else 1)
    if not bool((low >= -limit).all() and (high <= limit).all()):
        raise ValueError(
            f"{name} holds NaN, infinity, or values beyond {limit:.3g}, which {format} cannot represent; "
            "repair the checkpoint, or skip this weight"
        )
    if not format.zero:
        absmax = torch.maximum(high, -low)
        stores_absmax = book.unit != 1 or format.scale == "e8m0"
        return matrix, absmax if stores_absmax else absmax / book.peak, None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / book.high
    if isinstance(format.scale, str):  # the zero point belongs to the scale that decoding will see
        scale = _stored_scale(scale, format, name).float()
    zero = torch.round(-low / scale.clamp(min=_TINY)).clamp(0, book.high)
    return matrix, scale, zero.to(torch.uint8)


def _ranges(matrix: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """float32 (minimum, maximum) of every group of a matrix, each [row groups, column groups]."""
    rows, columns = matrix.shape
    height, width = group.rows or max(rows, 1), group.columns or max(columns, 1)
    grid = group.grid(matrix.shape)
    low = torch.full((grid[0] * height, grid[1]), math.inf, device=matrix.device)
    high = torch.full_like(low, -math.inf)
    for block in _row_blocks(rows, columns):
        values = matrix[block].float()
        if columns % width:  # a short last group repeats a value of its own
            last = values[:, -1:].expand(-1, -columns % width)
            values = torch.cat([values, last], dim=1)
        grouped = values.unflatten(1, (-1, width))
        low[block], high[block] = grouped.amin(-1), grouped.amax(-1)
    return low.view(-1, height, grid[1]).amin(1), high.view(-1, height, grid[1]).amax(1)


def _stored_scale(scale: Tensor, format: Format, name: str) -> Tensor:
    """float32 scales in the dtype they are stored in (E8M0: the biased exponent)."""
    if format.scale == "e8m0":
        # OCP MX 1.0, section 6.3: the power of two in the absolute maximum, less that in the peak.
        exponent = torch.frexp(scale).exponent - math.frexp(format.codebook.peak)[1]
        return torch.where(scale > 0, exponent.clamp(-127, 127) + 127, 0).to(torch.uint8)
    assert isinstance(format.scale, str)
    stored = scale.to(DTYPES[format.scale])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"{name}: a scale of {float(scale.max()):.3g} does not fit {format.scale}; use "
            f"{str(format).replace(':' + format.scale, '')}, whose scales are float32"
        )
    return stored


def _encode_pieces(
    pieces: list[tuple[Tensor, Tensor, Tensor | None]], scale: Tensor, format: Format, name: str
) -> tuple[Tensor, Tensor | QuantizedTensor, Tensor | None]:
    """(packed codes, stored scale, packed zero points) of all pieces; `scale` is float32 on the grid."""
    stored: Tensor | QuantizedTensor
    if isinstance(format.scale, Format):
        stored = quantize(scale, format.scale, f"the scales of {name}")
        used = scale if format.codes_before_scale else dequantize(stored, torch.float32)
    else:
        stored = _stored_scale(scale, format, name)
        used = _scale_values(stored)
    codes, start = [], 0
    for matrix, piece_scale, zero in pieces:
        size = piece_scale.numel()
        values = used.view(-1)[start : start + size].view(piece_scale.shape)
        codes.append(_encode_matrix(matrix, values, zero, format))
        start += size
    zeros = pieces[0][2]
    packed = None if zeros is None else pack(zeros, format.codebook.bits)
    return (codes[0] if len(codes) == 1 else torch.cat([c.reshape(-1) for c in codes])), stored, packed


def _scale_values(stored: Tensor) -> Tensor:
    """float32 values of stored scales; uint8 ones are E8M0: powers of two, biased by 127."""
    if stored.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)
    return stored.float()


def _decoded_scale(weight: QuantizedTensor) -> Tensor:
    """float32 scale on the grid, nested formats decoded."""
    if isinstance(weight.scale, QuantizedTensor):
        return dequantize(weight.scale, torch.float32)
    return _scale_values(weight.scale)


def _unpacked_zeros(weight: QuantizedTensor) -> Tensor | None:
    """uint8 zero points on the grid, or None."""
    if weight.zero is None:
        return None
    return unpack(weight.zero, weight.format.codebook.bits, weight.format.group.grid(weight.shape)[-1])


# --- codes ------------------------------------------------------------------------------------------


def _encode_matrix(matrix: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """Packed codes of a matrix [rows, columns], for float32 scales [row groups, column groups]."""
    group = Group(1, 0) if format.group.flat else format.group
    rows, columns = matrix.shape
    book, order = format.codebook, bit_order(format)
    packed = []
    for block in _row_blocks(rows, columns):
        spread = _spread(scale, group, block, (rows, columns))
        zeros = None if zero is None else _spread(zero, group, block, (rows, columns))
        codes = _encode(matrix[block].float(), spread, zeros, book)
        packed.append(pack(codes.reshape(-1) if format.group.flat else codes, book.bits, order))
    if not packed:
        return torch.empty(0, dtype=torch.uint8, device=matrix.device)
    return packed[0] if len(packed) == 1 else torch.cat(packed)


def _encode(values: Tensor, scale: Tensor, zero: Tensor | None, book: Codebook) -> Tensor:
    """Code of each float32 value, for a scale (and zero point) that broadcasts to it."""
    if book.reciprocal:
        scaled = values * _reciprocal(book, scale)
    else:
        scaled = values / torch.where(scale > 0, scale, 1.0)
    if book.integer:
        middle = book.middle if zero is None else zero
        codes = torch.round(scaled) + middle
        return codes.clamp(book.low, book.high).to(torch.int8 if book.signed else torch.uint8)
    _, thresholds, order = _tables(book, values.device)
    magnitude = scaled.abs() if book.sign_bit else scaled
    codes = _count_below(magnitude, thresholds)
    codes = codes if order is None else order[codes.int()]
    return codes | ((scaled < 0).to(torch.uint8) << (book.bits - 1)) if book.sign_bit else codes


def _count_below(values: Tensor, thresholds: Tensor) -> Tensor:
    """uint8: how many of the ascending thresholds (at most 255) are smaller than each value."""
    if len(thresholds) > 16:
        return torch.bucketize(values.contiguous(), thresholds, out_int32=True).to(torch.uint8)
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for threshold in thresholds.unbind():  # several times as fast as searching
        codes += values > threshold
    return codes


def _reciprocal(book: Codebook, absmax: Tensor) -> Tensor:
    """peak / absmax, which bitsandbytes multiplies with; finite, so that a group of zeros gets codes of 0."""
    return book.peak / absmax.clamp(min=_TINY * book.peak)


def _decode(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: QuantizedTensor) -> Tensor:
    """float32 weights of unpacked codes, for scales and zero points that broadcast to them."""
    book = weight.format.codebook
    if book.integer:
        decoded = codes.float() - (book.middle if zero is None else zero.float())
    else:
        decoded = _tables(book, codes.device)[0].index_select(0, codes.flatten().int()).view(codes.shape)
    decoded = decoded * scale
    if book.unit != 1:
        decoded = decoded * book.unit
    return decoded if weight.offset is None else decoded + weight.offset


def _codes_at(packed: Tensor, places: Tensor, format: Format) -> Tensor:
    """Codes at flat positions of a flat format: 8 bits, or 4 with the first of a pair in the high bits."""
    if format.codebook.bits == 8:
        return packed[places]
    pair = packed[places // 2]
    return torch.where(places % 2 == 0, pair >> 4, pair & 0xF)


@lru_cache(maxsize=64)
def _tables(book: Codebook, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values float32, thresholds float32, order uint8 or None if that of the codes) on `device`."""
    in_order = book.order == tuple(range(len(book.order)))
    return (
        torch.tensor(book.values, dtype=torch.float32, device=device),
        torch.tensor(book.thresholds, dtype=torch.float32, device=device),
        None if in_order else torch.tensor(book.order, dtype=torch.uint8, device=device),
    )


# --- blocks -----------------------------------------------------------------------------------------


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Blocks of about `_BLOCK` weights; an even number of rows each, so that flat codes fill whole bytes."""
    step = max(2, _BLOCK // max(columns, 1) // 2 * 2)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _spread(grid: Tensor, group: Group, rows: slice | Tensor, shape: tuple[int, int]) -> Tensor:
    """Values on the grid [row groups, column groups] → for `rows`, broadcastable to [rows, columns]."""
    height, columns = group.rows or max(shape[0], 1), shape[1]
    wanted = torch.arange(rows.start, rows.stop, device=grid.device) if isinstance(rows, slice) else rows
    of_rows = grid[wanted // height] if height != 1 or not isinstance(rows, slice) else grid[rows]
    if not group.columns or grid.shape[1] == 1:
        return of_rows
    return of_rows.repeat_interleave(group.columns, dim=1)[:, :columns]


def _absmax(rows: Tensor) -> Tensor:
    """[rows, 1] largest magnitudes; 0 for rows without elements."""
    return rows.abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.new_zeros(len(rows), 1)


def _exact_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [m, k] · weight [n, k]ᵀ of float32 codes within ±127 and int8 weights, in int32 if that holds it.

    float32 holds sums of up to 1024 such products exactly, hence blocks of 1024 columns.
    """
    whole = torch.int32 if codes.shape[1] * 127 * 128 < 2**31 else torch.int64
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=whole, device=codes.device)
    for start in range(0, codes.shape[1], 1024):
        block = slice(start, start + 1024)
        total += (codes[:, block] @ weight[:, block].float().T).int()
    return total

"""Quantize, dequantize and embeddings of the CPU library: the reference's bits, on every instruction set."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits import reference
from fewbits.backends.cpu import codes, library
from fewbits.backends.cpu.structs import DTYPES, dense, describe, encoding
from fewbits.format import Format, matrix_shape
from fewbits.tensor import DTYPES as PART_DTYPES
from fewbits.tensor import QuantizedTensor

Shape = tuple[int, ...]
SHAPES: list[Shape] = [
    (), (1,), (1, 1), (3, 5), (7, 33), (2, 130), (5, 257), (3, 5, 33), (16, 64), (130, 300), (1, 5000),
]  # fmt: skip
EMPTY: list[Shape] = [(0,), (0, 4), (4, 0)]
INPUTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def differences(a: Tensor, b: Tensor) -> int:
    """How many elements differ in a bit; any NaN is any other's equal. -1 for another dtype or shape."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return -1
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    differ = a.contiguous().view(-1).view(whole) != b.contiguous().view(-1).view(whole)
    if a.is_floating_point():
        differ &= ~(a.isnan() & b.isnan()).view(-1)
    return int(differ.sum())


def assert_same(got: QuantizedTensor, wanted: QuantizedTensor, where: Any) -> None:
    assert (got.format, got.shape, got.dtype) == (wanted.format, wanted.shape, wanted.dtype), where
    parts, others = got.parts(), wanted.parts()
    assert list(parts) == list(others), where
    wrong = {name: differences(parts[name], others[name]) for name in parts}
    assert not any(wrong.values()), (wrong, where)


def values(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 0.1).to(dtype)


def random_parts(format: Format, shape: Shape) -> QuantizedTensor:
    """Bytes at random and scales of both signs: any file could hold them."""
    parts = []
    for part in format.parts(torch.Size(shape)):
        if part.dtype in ("u8", "i8"):
            top = 254 if part.name == "scale" else 255  # E8M0 has no use for 255
            parts.append(
                torch.randint(0, top + 1, part.shape, dtype=torch.uint8).view(PART_DTYPES[part.dtype])
            )
        else:
            parts.append(torch.randn(part.shape).to(PART_DTYPES[part.dtype]))
    return QuantizedTensor.from_parts(parts, format, shape)


def test_quantize_gives_the_bits_of_the_reference(format, each):
    cases = []
    for shape in SHAPES + EMPTY:
        for dtype in INPUTS if math.prod(shape) < 1000 else INPUTS[:2]:
            weight = values(shape, dtype)
            cases.append((weight, reference.quantize(weight, format)))
    for isa in each():
        for weight, wanted in cases:
            assert_same(codes.quantize(weight, format), wanted, (isa, weight.shape, weight.dtype))


def test_dequantize_gives_the_bits_of_the_reference_for_any_bytes(format, each):
    cases = []
    for shape in [*SHAPES, (33, 70)]:
        weight = random_parts(format, shape)
        for dtype in OUTPUTS if math.prod(shape) < 2000 else OUTPUTS[:2]:
            cases.append((weight, reference.dequantize(weight, dtype)))
    for isa in each():
        for weight, wanted in cases:
            got = codes.dequantize(weight, wanted.dtype)
            assert differences(got, wanted) == 0, (isa, wanted.shape, wanted.dtype)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_decodes_to_nothing(format, shape):
    decoded = codes.dequantize(codes.quantize(torch.empty(shape), format), torch.bfloat16)
    assert (decoded.shape, decoded.dtype) == (torch.Size(shape), torch.bfloat16)


def wild() -> dict[str, Tensor]:
    spread = torch.randn(6, 130) * torch.logspace(-6, 2, 130)
    spread[2] = 0
    return {
        "spread": spread,
        "positive": spread.abs() + 1,
        "negative": -spread.abs() - 1,
        "zeros": torch.zeros(5, 257),
        "zeros of both signs": torch.zeros(5, 257) * torch.randn(5, 257).sign(),
        "subnormal": torch.linspace(-1, 1, 260).view(2, 130) * 1e-40,
        "tiny": torch.linspace(-1, 1, 260).view(2, 130) * 1.2e-38,
        "ties": torch.arange(-520, 520).view(4, 260) / 16,
        "one outlier": torch.ones(3, 300).index_fill(1, torch.tensor([77]), 1000.0),
    }


def test_wild_values_give_the_bits_of_the_reference(format, each):
    cases = []
    for name, weight in wild().items():
        wanted = reference.quantize(weight, format)
        cases.append((name, weight, wanted, reference.dequantize(wanted, torch.bfloat16)))
    for isa in each():
        for name, weight, wanted, decoded in cases:
            got = codes.quantize(weight, format)
            # A zero has one value and two signs; which of them a reduction returns, nobody promises.
            assert got == wanted, (isa, name)
            assert torch.equal(codes.dequantize(got, torch.bfloat16), decoded), (isa, name)


def test_any_stride_gives_the_bits_of_the_reference(format):
    strided = {
        "transposed": torch.randn(65, 6).T,
        "sliced": torch.randn(9, 140)[1::2, 3:-4:2],
        "expanded": torch.randn(1, 65).expand(5, 65),
        "reversed dimensions": torch.randn(5, 4, 33).permute(2, 1, 0),
    }
    for name, weight in strided.items():
        assert not weight.is_contiguous()
        assert_same(codes.quantize(weight, format), reference.quantize(weight, format), name)


def test_huge_values_give_the_bits_or_the_error_of_the_reference(format, each):
    for _ in each():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for size in (1e37, 3e38):
                assert_same_outcome(torch.linspace(-1, 1, 130, dtype=dtype).view(2, 65) * size, format)


def test_nan_and_infinity_are_refused_in_the_words_of_the_reference(format, each):
    for _ in each():
        for bad in (math.nan, math.inf, -math.inf):
            for place in ((0, 0), (1, 77), (2, 199)):
                weight = torch.randn(3, 200)
                weight[place] = bad
                assert "w holds NaN" in assert_same_outcome(weight, format)


def assert_same_outcome(weight: Tensor, format: Format) -> str:
    """Both return the same, or both raise the same; returns the text of the error."""
    outcomes = []
    for quantize in (reference.quantize, codes.quantize):
        try:
            outcomes.append(quantize(weight, format, "w"))
        except ValueError as error:
            outcomes.append(str(error))
    wanted, got = outcomes
    if isinstance(wanted, str) or isinstance(got, str):
        assert got == wanted
        return wanted
    assert_same(got, wanted, "no error")
    return ""


def test_integers_are_refused_in_the_words_of_the_reference():
    with pytest.raises(ValueError, match=r"only floating tensors are quantized, got torch\.int32"):
        codes.quantize(torch.ones(3, dtype=torch.int32), Format.parse("nf4"))


# --- parts of a weight ------------------------------------------------------------------------------


def decode_part(
    weight: QuantizedTensor,
    dtype: torch.dtype,
    rows: tuple[int, int] | list[int],
    columns: tuple[int, int],
    gap: int = 0,
) -> Tensor:
    """Rows [from, to), or the listed ones, of columns [from, to), written with `gap` elements after each."""
    listed = torch.tensor(rows) if isinstance(rows, list) else None
    count = len(rows) if isinstance(rows, list) else rows[1] - rows[0]
    width = columns[1] - columns[0]
    out = torch.full((count, width + gap), 7.0, dtype=dtype)
    weight = dense(weight)
    status = library.library().fewbits_dequantize(
        describe(weight),
        None if listed is None else listed.data_ptr(),
        0 if listed is not None else rows[0],
        count,
        columns[0],
        width,
        out.data_ptr(),
        out.numel(),
        width + gap,
        DTYPES[dtype],
        1,
    )
    library.check(status, "a part")
    assert (out[:, width:] == 7).all(), "what lies between rows is not touched"
    return out[:, :width]


PARTS = [((0, 37), (0, 1)), ((3, 4), (5, 70)), ((30, 37), (64, 130)), ((1, 9), (1, 129)), ((0, 0), (0, 5))]


@pytest.mark.parametrize("columns", [130, 131])
def test_any_rows_and_columns_decode_as_those_of_the_whole(format, columns, each):
    weight = random_parts(format, (37, columns))
    for dtype in (torch.float32, torch.bfloat16):
        whole = reference.dequantize(weight, dtype)
        for isa in each():
            for rows, part in PARTS:
                got = decode_part(weight, dtype, rows, part, gap=3)
                assert differences(got, whole[slice(*rows), slice(*part)]) == 0, (isa, dtype, rows, part)
            listed = [36, 0, 5, 5, 17]
            assert differences(decode_part(weight, dtype, listed, (0, columns)), whole[listed]) == 0, isa


def test_embedding_gives_the_rows_of_the_reference(format, each):
    weight = random_parts(format, (50, 70))
    for indices in (torch.randint(0, 50, (3, 4)), torch.tensor(7), torch.tensor([0, 49], dtype=torch.int32)):
        for dtype in (torch.float32, torch.float16, torch.float64):
            wanted = reference.embedding(indices.long(), weight, dtype)
            for isa in each():
                assert differences(codes.embedding(indices, weight, dtype), wanted) == 0, isa
    assert codes.embedding(torch.empty(0, 3, dtype=torch.int64), weight, torch.float32).shape == (0, 3, 70)


@pytest.mark.parametrize("indices", [[0, 50], [-1]])
def test_indices_beyond_the_rows_are_refused_in_the_words_of_the_reference(indices):
    weight = codes.quantize(values((50, 64)), Format.parse("nf4"))
    with pytest.raises(IndexError, match="do not fit an embedding of 50 rows"):
        codes.embedding(torch.tensor(indices), weight, torch.float32)


# --- threads, memory --------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_threads_agree(weight: Tensor, format: Format) -> tuple[QuantizedTensor, Tensor]:
    torch.set_num_threads(1)
    alone = codes.quantize(weight, format)
    decoded = codes.dequantize(alone, torch.bfloat16)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert_same(codes.quantize(weight, format), alone, count)
        assert differences(codes.dequantize(alone, torch.bfloat16), decoded) == 0, count
    return alone, decoded


def test_any_number_of_threads_gives_the_bytes_of_the_reference(format, threads):
    weight = values((301, 1003), torch.bfloat16)
    quantized, decoded = assert_threads_agree(weight, format)
    assert_same(quantized, reference.quantize(weight, format), "the reference")
    assert differences(decoded, reference.dequantize(quantized, torch.bfloat16)) == 0


@pytest.mark.parametrize(
    "spelling", ["nf4:g64:dq", "int8:tensor", "int4:g3", "int3:row", "nvfp4", "fp8_e5m2:b32x32"]
)
def test_threads_share_long_rows_and_narrow_matrices(spelling, threads):
    for shape in ((1, 300_001), (40_000, 8)):
        assert_threads_agree(values(shape, torch.bfloat16), Format.parse(spelling))


@pytest.mark.parametrize("spelling", ["nf4:g64", "int4:g100:zero", "mxfp4", "int8:row"])
def test_results_too_large_for_the_caches_are_the_references(spelling, each, threads):
    weight = random_parts(Format.parse(spelling), (2048, 4101))
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = reference.dequantize(weight, dtype)
        for isa in each():
            assert differences(codes.dequantize(weight, dtype), wanted) == 0, (isa, dtype)


class Guarded:
    """Memory whose last byte is the last before a page that cannot be touched."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.kept: list[Any] = []

    def __call__(self, content: Tensor) -> Tensor:
        """A copy of `content` at the end of a page; nothing behind it can be read or written."""
        size, page = content.nbytes, mmap.PAGESIZE
        pages = -(-max(size, 1) // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert self.libc.mprotect(start + pages * page, page, 0) == 0
        buffer = (ctypes.c_uint8 * size).from_address(start + pages * page - size)
        self.kept += [memory, buffer]
        guarded = torch.frombuffer(buffer, dtype=torch.uint8).view(content.dtype).view(content.shape)
        return guarded.copy_(content)


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="mprotect is asked for the guard page")
def test_nothing_is_read_or_written_beyond_the_ends(format, each):
    for shape in ((1, 1), (5, 33), (4, 127), (2, 64), (3, 2050)):
        guarded, weight = Guarded(), random_parts(format, shape)
        parts = {name: guarded(part) for name, part in weight.parts().items()}
        at_the_end = QuantizedTensor.from_parts(parts, format, shape)
        wanted = reference.dequantize(weight, torch.bfloat16)
        out = guarded(torch.empty(shape, dtype=torch.bfloat16))
        source = guarded(values(shape, torch.bfloat16))
        for isa in each():
            decode_into(out, at_the_end)
            assert differences(out, wanted) == 0, (isa, shape)
            if not isinstance(format.scale, Format) and not format.offset:  # several calls of this one
                encode_at_the_end(source, format, guarded)


def decode_into(out: Tensor, weight: QuantizedTensor) -> None:
    struct = describe(weight)
    status = library.library().fewbits_dequantize(
        struct, None, 0, struct.rows, 0, struct.columns, out.data_ptr(), out.numel(), struct.columns, 2, 1
    )
    library.check(status, "at the end of a page")


def encode_at_the_end(source: Tensor, format: Format, guarded: Guarded) -> None:
    quantized = reference.quantize(source, format)
    made = {name: guarded(torch.zeros_like(part)) for name, part in quantized.parts().items()}
    zero = made.get("zero")
    status = library.library().fewbits_quantize(
        encoding(format, tuple(source.shape)), source.data_ptr(), source.numel(), 2, None, 0,
        made["scale"].data_ptr(), made["scale"].nbytes,
        None if zero is None else zero.data_ptr(), 0 if zero is None else zero.nbytes,
        made["codes"].data_ptr(), made["codes"].nbytes, 1,
    )  # fmt: skip
    library.check(status, "at the end of a page")
    assert_same(QuantizedTensor.from_parts(made, format, source.shape, source.dtype), quantized, source.shape)


# --- more than 32 bits can count --------------------------------------------------------------------


def untouched(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@pytest.mark.parametrize("spelling", ["nf4:g64", "int4:g64", "fp8_e4m3:g64"])
def test_more_than_2_to_the_31_codes_decode_to_the_last(spelling, each):
    format, shape = Format.parse(spelling), (1, 2**31 + 130)
    parts = [untouched(part.shape, PART_DTYPES[part.dtype]) for part in format.parts(shape)]
    weight = QuantizedTensor.from_parts(parts, format, shape)
    weight.codes.view(-1)[-40:] = torch.arange(-40, 0, dtype=torch.int8).view(torch.uint8)
    weight.scale.view(-1)[-2:] = torch.tensor([2.0, 3.0])
    ends = [
        part.view(-1)[-math.prod(end.shape) :].view(end.shape)
        for part, end in zip(parts, format.parts((1, 66)), strict=True)
    ]
    wanted = reference.dequantize(QuantizedTensor.from_parts(ends, format, (1, 66)), torch.float32)
    for isa in each():
        got = decode_part(weight, torch.float32, (0, 1), (2**31 + 64, 2**31 + 130))
        assert differences(got, wanted) == 0, isa


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["nf4:g64", "int4:g64:zero"])
def test_more_than_2_to_the_31_values_become_codes(spelling):
    format = Format.parse(spelling)
    weight = untouched((1, 2**31 + 130), torch.bfloat16)
    weight[:, -66:] = torch.randn(66)
    quantized, end = codes.quantize(weight, format), codes.quantize(weight[:, -66:], format)
    assert torch.equal(quantized.codes.view(-1)[-33:], end.codes.view(-1))
    assert torch.equal(quantized.scale.view(-1)[-2:], end.scale.view(-1))


# --- anything ---------------------------------------------------------------------------------------

sizes = st.integers(1, 300)
spellings = st.sampled_from(
    ["nf4", "fp4", "int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "dynamic8"]
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Format, tuple[int, int]]:
    family = draw(spellings)
    flat = family in ("nf4", "fp4", "dynamic8")
    size = draw(sizes)
    group = (
        f"g{2 * size}" if flat else draw(st.sampled_from([f"g{size}", f"b{draw(st.integers(2, 9))}x{size}"]))
    )
    words = [family, group, draw(st.sampled_from(["", "f16", "bf16", "dq"]))]
    words += [draw(st.sampled_from(["", "zero"]))] if family.startswith("int") else []
    words += [draw(st.sampled_from(["", "offset"]))] if flat else []
    return Format.parse(":".join(filter(None, words))), (draw(st.integers(1, 20)), draw(sizes))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), seed=st.integers(0, 2**31), dtype=st.sampled_from(INPUTS))
def test_any_format_and_shape_gives_the_bits_of_the_reference(case, seed, dtype):
    format, shape = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    wanted = reference.quantize(weight, format)
    got = codes.quantize(weight, format)
    assert_same(got, wanted, format)
    assert differences(codes.dequantize(got, torch.float16), reference.dequantize(wanted, torch.float16)) == 0


def test_matrices_are_what_shapes_are_seen_as():
    """What `describe` and `encoding` count on."""
    assert matrix_shape(()) == (1, 1)
    struct = describe(codes.quantize(torch.randn(2, 3, 8), Format.parse("int8:row")))
    assert (struct.rows, struct.columns, struct.group_rows, struct.group_columns) == (6, 8, 1, 8)

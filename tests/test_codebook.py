"""The tables of values, and which code a value gets."""

import bisect
import hashlib
import itertools
import math
import struct

import numpy as np
import pytest
import torch

from fewbits.codebook import CODEBOOKS, Codebook
from fewbits.format import Format
from fewbits.packing import unpack
from fewbits.reference import quantize

NF4 = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1,
]  # fmt: skip
FP4 = [0, 0.0052083335, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25]
FP4_CUDA_THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

TABLES = ["nf4", "dynamic8", "udynamic8"]
MINIFLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def float32_bytes(values) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def magnitude_code(book: Codebook, value: float) -> int:
    """The code that thresholds and order stand for: up when strictly greater."""
    return book.order[bisect.bisect_left(book.thresholds, value)]


def test_nf4_holds_the_sixteen_values_of_qlora():
    assert float32_bytes(CODEBOOKS["nf4"].values) == float32_bytes(NF4)


def test_fp4_holds_sign_and_magnitude_in_bitsandbytes_order_with_code_8_decoding_to_plus_zero():
    negatives = [0, *(-value for value in FP4[1:])]
    assert float32_bytes(CODEBOOKS["fp4"].values) == float32_bytes(FP4 + negatives)


def test_fp4_goes_up_at_the_literals_of_the_cuda_kernel():
    assert float32_bytes(CODEBOOKS["fp4"].thresholds) == float32_bytes(FP4_CUDA_THRESHOLDS)
    assert CODEBOOKS["fp4"].order == (0, 1, 6, 7, 4, 5, 2, 3)


@pytest.mark.parametrize(
    ("name", "prefix"), [("dynamic8", "e732639a65f497b4"), ("udynamic8", "305f002cc11278fb")]
)
def test_dynamic_maps_equal_bitsandbytes_in_every_bit(name, prefix):
    values = CODEBOOKS[name].values
    assert len(values) == 256
    assert hashlib.sha256(float32_bytes(values)).hexdigest().startswith(prefix)


def test_e2m1_holds_the_values_of_ocp_mx():
    assert float32_bytes(CODEBOOKS["e2m1"].values) == float32_bytes(E2M1 + [-value for value in E2M1])


@pytest.mark.parametrize(("name", "dtype"), MINIFLOATS.items())
def test_fp8_values_equal_torchs_for_all_finite_codes(name, dtype):
    truth = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    mine = torch.tensor(CODEBOOKS[name].values)
    finite = truth.isfinite()
    assert torch.equal(mine[finite].view(torch.int32), truth[finite].view(torch.int32))
    assert mine[~finite].isnan().all()
    assert not mine[finite].isnan().any()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_table_is_exact_float32_and_as_long_as_its_codes(name):
    book = CODEBOOKS[name]
    assert len(book.values) in (0, 2**book.bits)
    assert all(math.isnan(v) or struct.unpack("<f", struct.pack("<f", v))[0] == v for v in book.values)
    assert [book.values[code] for code in book.order] == sorted(book.values[code] for code in book.order)
    assert len(book.thresholds) == max(len(book.order) - 1, 0)


def probes(values: list[float]):
    """(probe, is it the float32 middle, lower, upper) at and around the middle of every two neighbours."""
    for low, high in itertools.pairwise(values):
        middle = np.float32((np.float64(low) + np.float64(high)) / 2)
        yield float(np.nextafter(middle, np.float32(-np.inf))), False, low, high
        yield float(middle), True, low, high
        yield float(np.nextafter(middle, np.float32(np.inf))), False, low, high
        yield low, False, low, high
        yield high, False, low, high


@pytest.mark.parametrize("name", TABLES)
def test_tables_take_the_nearest_value_and_the_lower_one_on_a_float32_middle(name):
    book = CODEBOOKS[name]
    for value, is_middle, low, _ in probes(sorted(book.values)):
        chosen = book.values[magnitude_code(book, value)]
        if is_middle:
            assert chosen == low, (value, chosen)
        else:
            assert abs(chosen - value) == min(abs(v - value) for v in book.values), (value, chosen)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_minifloats_take_the_nearest_value_and_the_even_code_on_a_tie(name):
    book = CODEBOOKS[name]
    finite = [v for v in book.values[: 2 ** (book.bits - 1)] if not math.isnan(v)]
    checked = 0
    for value, is_middle, low, high in probes(finite):
        code = magnitude_code(book, value)
        if is_middle:
            assert value - low == high - value, "middles of minifloats are exact"
            assert code % 2 == 0
            assert book.values[code] in (low, high)
            checked += 1
        else:
            assert abs(book.values[code] - value) == min(abs(v - value) for v in finite), (value, code)
    assert checked == len(finite) - 1


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_minifloats_saturate(name):
    book = CODEBOOKS[name]
    largest = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}[name]
    for value in (largest, largest * 1.2, 3e38):
        assert book.values[magnitude_code(book, value)] == largest


def test_fp4_takes_the_nearest_magnitude_away_from_its_thresholds():
    book = CODEBOOKS["fp4"]
    magnitudes = sorted(FP4)
    for value in np.linspace(0, 1.2, 20001, dtype=np.float32).tolist():
        if min(abs(value - t) for t in FP4_CUDA_THRESHOLDS) > 2e-7:
            best = min(abs(v - value) for v in magnitudes)
            assert abs(book.values[magnitude_code(book, value)] - value) <= best + 1e-7


def float16_values(largest: float) -> torch.Tensor:
    """All finite float16 values of magnitude up to `largest`, but -0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    return every[every.isfinite() & (every.abs() <= largest) & ~((every == 0) & every.signbit())]


@pytest.mark.parametrize(("name", "dtype"), MINIFLOATS.items())
def test_fp8_codes_equal_torchs_cast_for_all_float16_values(name, dtype):
    largest = torch.finfo(dtype).max
    values = float16_values(largest)
    quantized = quantize(values, Format.parse(f"fp8_{name}:tensor"))  # its absmax is the peak: scale 1
    assert quantized.scale.item() == 1.0
    assert torch.equal(quantized.codes.view(-1), values.to(dtype).view(torch.uint8))


@pytest.mark.parametrize(("name", "dtype"), MINIFLOATS.items())
def test_thresholds_alone_reproduce_torchs_cast_beyond_the_largest_value_too(name, dtype):
    values = float16_values(65504.0)
    values = values[values >= 0][::7]
    truth = values.clamp(max=torch.finfo(dtype).max).to(dtype).view(torch.uint8).tolist()
    assert [magnitude_code(CODEBOOKS[name], value) for value in values.tolist()] == truth


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_quantizing_follows_the_thresholds_to_the_last_bit(name):
    table, thresholds = (
        (NF4, [float(np.float32((np.float64(a) + b) / 2)) for a, b in itertools.pairwise(NF4)])
        if name == "nf4"
        else (sorted(FP4), FP4_CUDA_THRESHOLDS)
    )
    edges = np.array(thresholds, dtype=np.float32)
    above = np.nextafter(edges, np.float32(2))
    values = np.concatenate([edges, above]).astype(np.float32)
    group = torch.zeros(64)
    group[: len(values)] = torch.from_numpy(values)
    group[-1] = 1.0  # absmax 1: nothing is scaled
    codes = unpack(quantize(group, Format.parse(f"{name}:g64")).codes.view(-1), 4, 64, "high_first")
    stored = NF4 if name == "nf4" else FP4
    decoded = [stored[code] for code in codes[: len(values)].tolist()]
    assert decoded == [*table[:-1], *table[1:]]


def test_fp4_sets_the_sign_for_every_value_below_zero_and_for_no_other():
    group = torch.zeros(64)
    group[:5] = torch.tensor([1.0, 0.001, -0.001, -0.0, -1.0])
    codes = unpack(quantize(group, Format.parse("fp4:g64")).codes.view(-1), 4, 64, "high_first")
    assert codes[:5].tolist() == [3, 0, 8, 0, 11]


@pytest.mark.parametrize(
    ("name", "low", "high", "middle"),
    [
        ("int8", -127, 127, 0),
        ("uint2", 0, 3, 2),
        ("uint3", 0, 7, 4),
        ("uint4", 0, 15, 8),
        ("uint8", 0, 255, 128),
    ],
)
def test_integer_codebooks_have_the_ranges_of_gptq_and_llm_int8(name, low, high, middle):
    book = CODEBOOKS[name]
    assert (book.integer, book.low, book.high, book.middle) == (True, low, high, middle)


def test_llm_int8_multiplies_with_the_float32_next_to_1_over_127_and_nothing_else_has_a_unit():
    assert CODEBOOKS["int8"].unit == float(np.float32(1 / 127))
    assert CODEBOOKS["int8"].unit == pytest.approx(7.874015718698502e-3, rel=1e-12)
    assert {book.unit for name, book in CODEBOOKS.items() if name != "int8"} == {1.0}

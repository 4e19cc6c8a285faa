"""The reference against slow, independent arithmetic: every format, odd shapes, dtypes and strides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fewbits import reference
from fewbits.format import Format
from fewbits.reference import dequantize, embedding, linear, linear_backward, quantize

NF4 = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1,
]  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def dynamic_map(signed: bool) -> np.ndarray:
    """arXiv 1511.04561 in float64: seven decades from 1e-6 up, each the middles of even steps of 0.1 … 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(values)).astype(np.float32)


def float8(dtype: torch.dtype) -> np.ndarray:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return np.where(np.isfinite(values), values, np.float32(np.nan))


def integers(bits: int) -> np.ndarray:
    return np.arange(2**bits, dtype=np.float32) - np.float32(2 ** (bits - 1))


@dataclass(frozen=True)
class Spec:
    """What a format means, told without the code under test.

    values  of each code, in units of the largest one that the scale maps to `peak`
    group   a flat group size, or (rows, columns) with 0 for all
    """

    values: np.ndarray
    bits: int
    group: int | tuple[int, int]
    peak: float = 1.0
    stores_absmax: bool = True
    scale: torch.dtype | str = torch.float32  # or "e8m0", "dq", "nvfp4"
    zero: bool = False
    offset: bool = False


def int8_values() -> np.ndarray:
    values = np.arange(256, dtype=np.float64)
    return np.where(values == 128, np.nan, np.where(values > 128, values - 256, values) / 127)


SIGNED_DYNAMIC = dynamic_map(signed=True)
UNSIGNED_DYNAMIC = dynamic_map(signed=False)
FP4_CODES = np.concatenate([FP4, -FP4])
E2M1_CODES = np.array(E2M1 + [-v for v in E2M1], dtype=np.float32)
E4M3, E5M2 = float8(torch.float8_e4m3fn), float8(torch.float8_e5m2)
SPECS: dict[str, Spec] = {
    "nf4:g64": Spec(np.array(NF4), 4, 64),
    "nf4:g32:dq": Spec(np.array(NF4), 4, 32, scale="dq"),
    "nf4:g64:f16": Spec(np.array(NF4), 4, 64, scale=torch.float16),
    "nf4:g128:offset": Spec(np.array(NF4), 4, 128, offset=True),
    "fp4:g64": Spec(FP4_CODES, 4, 64),
    "fp4:g64:dq": Spec(FP4_CODES, 4, 64, scale="dq"),
    "dynamic8:g256": Spec(SIGNED_DYNAMIC, 8, 256),
    "dynamic8:g7:offset": Spec(SIGNED_DYNAMIC, 8, 7, offset=True),
    "udynamic8:g64": Spec(UNSIGNED_DYNAMIC, 8, 64),
    "int8:row": Spec(int8_values(), 8, (1, 0)),
    "int8:tensor": Spec(int8_values(), 8, (0, 0)),
    "int8:g32:f16": Spec(int8_values(), 8, (1, 32), scale=torch.float16),
    "int8:b4x16:zero": Spec(np.arange(256.0), 8, (4, 16), zero=True),
    "int4:g128": Spec(integers(4), 4, (1, 128), 7.5, False),
    "int4:g32:f16:zero": Spec(np.arange(16.0), 4, (1, 32), scale=torch.float16, zero=True),
    "int4:g16:dq": Spec(integers(4), 4, (1, 16), 7.5, False, scale="dq"),
    "int3:g32": Spec(integers(3), 3, (1, 32), 3.5, False),
    "int3:b2x5:zero": Spec(np.arange(8.0), 3, (2, 5), zero=True),
    "int2:row:bf16": Spec(integers(2), 2, (1, 0), 1.5, False, scale=torch.bfloat16),
    "int2:tensor:zero": Spec(np.arange(4.0), 2, (0, 0), zero=True),
    "fp8_e4m3:row": Spec(E4M3, 8, (1, 0), 448.0, False),
    "fp8_e4m3:tensor": Spec(E4M3, 8, (0, 0), 448.0, False),
    "fp8_e4m3:b128x128": Spec(E4M3, 8, (128, 128), 448.0, False),
    "fp8_e5m2:g64": Spec(E5M2, 8, (1, 64), 57344.0, False),
    "mxfp4:g32": Spec(E2M1_CODES, 4, (1, 32), 6.0, scale="e8m0"),
    "nvfp4:g16": Spec(E2M1_CODES, 4, (1, 16), 6.0, False, scale="nvfp4"),
}
every_format = pytest.mark.parametrize("spelling", SPECS)
SHAPES = [(), (1,), (7,), (1, 63), (5, 257), (3, 5, 33), (130, 300), (0,), (0, 4), (4, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FLOAT32_EPS = 2.0**-23


def unpacked(packed: torch.Tensor, bits: int, count: int, high_first: bool) -> np.ndarray:
    """[rows, bytes] → integers [rows, count], bit by bit."""
    bitorder = "big" if high_first else "little"
    stream = np.unpackbits(packed.view(torch.uint8).numpy(), axis=-1, bitorder=bitorder)
    codes = stream[:, : count * bits].reshape(len(packed), count, bits).astype(np.int64)
    places = range(bits - 1, -1, -1) if high_first else range(bits)
    return (codes * np.array([1 << place for place in places])).sum(-1)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def group_numbers(spec: Spec, shape: tuple[int, ...]) -> np.ndarray:
    """The number of the group of every weight, in the order of the flat tensor."""
    if isinstance(spec.group, int):
        return np.arange(math.prod(shape)) // spec.group
    rows, columns = matrix_of(shape)
    height, width = spec.group[0] or max(rows, 1), spec.group[1] or max(columns, 1)
    across = -(-columns // width)
    return (np.arange(rows)[:, None] // height * across + np.arange(columns)[None, :] // width).ravel()


def group_extremes(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = int(groups.max()) + 1
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, groups, values)
    np.maximum.at(high, groups, values)
    return low, high


def nearest_distance(target: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Distance from each target to the nearest of `values`, in float64."""
    ordered = np.unique(values[~np.isnan(values)].astype(np.float64))
    right = np.clip(np.searchsorted(ordered, target), 0, len(ordered) - 1)
    left = np.clip(right - 1, 0, len(ordered) - 1)
    return np.minimum(np.abs(target - ordered[left]), np.abs(target - ordered[right]))


def check_scales(spec: Spec, quantized, values, groups) -> tuple[np.ndarray, np.ndarray]:
    """Checks what is stored as scale; returns (scale that decoding sees, scale that chose the codes)."""
    low, high = group_extremes(values, groups)
    if spec.zero:
        wanted = (np.maximum(high, 0) - np.minimum(low, 0)) / (2**spec.bits - 1)
    else:
        wanted = np.maximum(high, -low) / (1 if spec.stores_absmax else spec.peak)
    if spec.scale == "dq":
        return check_double_quantization(quantized.scale, wanted), wanted
    if spec.scale == "nvfp4":
        inner = quantized.scale
        tensor_scale = inner.scale.double().item()
        assert tensor_scale == pytest.approx(wanted.max() / 448, rel=1e-6)
        codes = inner.codes.view(torch.float8_e4m3fn).double().numpy().ravel()
        used = (codes.astype(np.float32) * np.float32(tensor_scale)).astype(np.float64)
        distance = nearest_distance(wanted, E4M3.astype(np.float64) * tensor_scale)
        assert (np.abs(used - wanted) <= distance + 1e-6 * wanted.max()).all()
        return used, used
    stored = quantized.scale.reshape(-1)
    if spec.scale == "e8m0":
        exponents = np.array([math.floor(math.log2(v)) - 2 + 127 if v else 0 for v in wanted.tolist()])
        assert stored.dtype == torch.uint8
        assert stored.tolist() == np.clip(exponents, 0, 254).tolist()
        return 2.0 ** (exponents - 127.0), 2.0 ** (exponents - 127.0)
    assert stored.dtype == spec.scale
    used = stored.double().numpy()
    if spec.stores_absmax and spec.scale == torch.float32 and not spec.zero and not spec.offset:
        assert np.array_equal(used, wanted), "an absolute maximum is stored exactly"
    relative = FLOAT32_EPS + torch.finfo(spec.scale).eps / 2
    smallest = float(torch.tensor(0.0, dtype=spec.scale).nextafter(torch.tensor(1.0, dtype=spec.scale)))
    assert (np.abs(used - wanted) <= relative * wanted + smallest).all()
    return used, used


def check_double_quantization(scale, wanted: np.ndarray) -> np.ndarray:
    """bitsandbytes: the scales less their mean, in the signed dynamic map, 256 to a float32 maximum."""
    offset = scale.offset.double().item()
    assert offset == pytest.approx(wanted.mean(), rel=1e-6)
    rest = wanted - offset
    tolerance = 4 * FLOAT32_EPS * wanted.max()
    blocks = np.arange(len(rest)) // 256
    maxima = np.zeros(blocks[-1] + 1)
    np.maximum.at(maxima, blocks, np.abs(rest))
    inner = scale.scale.double().numpy()
    assert np.allclose(inner, maxima, rtol=1e-6, atol=tolerance)
    codes = scale.codes.numpy().ravel()
    chosen = SIGNED_DYNAMIC[codes].astype(np.float64) * inner[blocks]
    pairs = zip(rest, inner[blocks], strict=True)
    distance = np.array([nearest_distance(one, SIGNED_DYNAMIC * maximum) for one, maximum in pairs])
    assert (np.abs(chosen - rest) <= distance + tolerance).all()
    return chosen + offset


def check_against_oracle(weight: torch.Tensor, spelling: str) -> None:
    spec, shape = SPECS[spelling], tuple(weight.shape)
    quantized = quantize(weight, Format.parse(spelling), "w")
    assert (quantized.shape, quantized.dtype, str(quantized.format)) == (weight.shape, weight.dtype, spelling)
    values = weight.detach().to(torch.float32).double().contiguous().numpy().ravel()
    decoded = dequantize(quantized, torch.float32)
    assert decoded.shape == weight.shape
    if not values.size:
        return
    offset = 0.0
    if spec.offset:
        offset = quantized.offset.double().item()
        assert offset == pytest.approx(values.mean(), rel=1e-5, abs=1e-6)
        values = values - offset
    groups = group_numbers(spec, shape)
    used, chooser = check_scales(spec, quantized, values, groups)
    columns = matrix_of(shape)[1]
    flat = isinstance(spec.group, int)
    codes = quantized.codes.reshape(1, -1) if flat else quantized.codes
    codes = unpacked(codes, spec.bits, math.prod(shape) if flat else columns, flat).ravel()
    zero = np.zeros(len(values))
    if spec.zero:
        zero = check_zero_points(spec, quantized, values, groups, used, shape)
    in_units = spec.values.astype(np.float64)[codes] - zero
    assert not np.isnan(in_units).any()
    # The code is the nearest one, in units of the scale that was there when it was chosen.
    size = chooser[groups]
    scaled = np.divide(values, size, out=np.zeros_like(values), where=size > 0)
    distance = nearest_distance(scaled + zero, spec.values)
    slack = 2e-6 * (np.abs(in_units) + 1) * size
    assert (np.abs(in_units * size - values)[size > 0] <= (distance * size + slack)[size > 0]).all()
    # The weight is the formula's, in float32.
    truth = in_units * used[groups] + offset
    error = np.abs(decoded.double().numpy().ravel() - truth)
    size = np.abs(used[groups])
    if spec.scale == "dq":  # the scale is a float32 sum with their mean
        size = size + 2 * np.abs(wanted_mean(quantized))
    assert (error <= 2 * FLOAT32_EPS * (np.abs(in_units) * size + abs(offset))).all()
    for dtype in DTYPES:
        assert torch.equal(dequantize(quantized, dtype), decoded.to(dtype)), "one rounding from float32"


def wanted_mean(quantized) -> float:
    return quantized.scale.offset.double().item()


def check_zero_points(spec, quantized, values, groups, used, shape) -> np.ndarray:
    low, _ = group_extremes(values, groups)
    across = quantized.scale.shape[-1]
    zeros = unpacked(quantized.zero, spec.bits, across, False).ravel()
    exact = np.divide(-np.minimum(low, 0), used, out=np.zeros_like(used), where=used > 0)
    assert (np.abs(zeros - np.clip(exact, 0, 2**spec.bits - 1)) <= 0.5 + 1e-4).all()
    return zeros[groups].astype(np.float64)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_codes_and_weights_follow_the_formula(spelling, shape):
    dtypes = DTYPES if math.prod(shape) < 10000 else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        check_against_oracle(torch.randn(shape, dtype=dtype), spelling)


@every_format
@pytest.mark.parametrize("name", ["transposed", "sliced", "expanded", "reversed dimensions"])
def test_any_stride_gives_the_bits_of_the_contiguous_tensor(spelling, name):
    weight = {
        "transposed": lambda: torch.randn(65, 6).T,
        "sliced": lambda: torch.randn(9, 140)[1::2, 3:-4:2],
        "expanded": lambda: torch.randn(1, 65).expand(5, 65),
        "reversed dimensions": lambda: torch.randn(5, 4, 33).permute(2, 1, 0),
    }[name]()
    assert not weight.is_contiguous()
    check_against_oracle(weight, spelling)
    assert quantize(weight, Format.parse(spelling)) == quantize(weight.contiguous(), Format.parse(spelling))


@every_format
def test_wild_ranges_follow_the_formula(spelling):
    weight = torch.randn(6, 130) * torch.logspace(-6, 2, 130)
    weight[2] = 0
    check_against_oracle(weight, spelling)
    check_against_oracle(weight.abs(), spelling)
    check_against_oracle(-weight.abs() - 1, spelling)


@every_format
@pytest.mark.parametrize("shape", [(7,), (5, 257)])
def test_zeros_decode_to_exact_zeros(spelling, shape):
    quantized = quantize(torch.zeros(shape), Format.parse(spelling))
    assert torch.equal(dequantize(quantized, torch.float32), torch.zeros(shape))


@pytest.mark.parametrize("spelling", [s for s in SPECS if not SPECS[s].offset and SPECS[s].scale != "dq"])
def test_a_group_of_zeros_decodes_to_exact_zeros_beside_others(spelling):
    weight = torch.randn(4, 512)
    weight[1] = 0
    decoded = dequantize(quantize(weight, Format.parse(spelling)), torch.float32)
    if spelling != "udynamic8:g64":
        assert decoded[0].abs().max() > 0
    assert torch.equal(decoded[1], torch.zeros(512))


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1.2e-38, 3e-36])
@every_format
def test_tiny_weights_decode_to_finite_tiny_weights(spelling, tiny):
    weight = torch.linspace(-1, 1, 65).view(1, 65) * tiny
    decoded = dequantize(quantize(weight, Format.parse(spelling)), torch.float32)
    assert decoded.isfinite().all()
    # Nothing can come out larger than went in, but for the rounding of the scale itself.
    assert decoded.abs().max() <= max(2 * tiny, 2.0**-126 * 8)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_huge_weights_decode_to_finite_ones_or_are_refused_by_name(spelling, dtype):
    weight = torch.linspace(-1, 1, 130, dtype=dtype).view(2, 65) * 1e37
    if spelling in ("int8:row", "int8:tensor") or ":f16" in spelling:
        # float32 cannot hold 127 times the absolute maximum; float16 not even the scale
        with pytest.raises(ValueError, match=r"^w(:| holds) "):
            quantize(weight, Format.parse(spelling), "w")
        return
    decoded = dequantize(quantize(weight, Format.parse(spelling), "w"), torch.float32)
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= 1.4e37


@every_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_the_name_of_the_tensor(spelling, value):
    weight = torch.randn(3, 200)
    weight[1, 77] = value
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.weight holds NaN, infinity"):
        quantize(weight, Format.parse(spelling), "layers.3.mlp.weight")


def test_values_beyond_float32_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^w holds .*values beyond 3\.4e\+38"):
        quantize(torch.full((2, 64), 1e300, dtype=torch.float64), Format.parse("nf4:g64"), "w")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_only_floating_tensors_are_quantized(dtype):
    with pytest.raises(ValueError, match=r"^w: only floating tensors"):
        quantize(torch.ones(4, 64).to(dtype), Format.parse("nf4:g64"), "w")


@pytest.mark.parametrize("spelling", ["nf4:g64:f16", "int4:g32:f16:zero", "int8:g32:f16"])
def test_a_scale_beyond_float16_is_refused_with_the_format_that_takes_it(spelling):
    instead = spelling.replace(":f16", "")
    with pytest.raises(ValueError, match=rf"^w: a scale of .*does not fit f16; use {instead}, "):
        quantize(torch.full((2, 64), 3e6), Format.parse(spelling), "w")
    quantize(torch.full((2, 64), 3e6), Format.parse(instead), "w")


# Not those whose codes are chosen before the scale is rounded, nor those without codes below 0.
@pytest.mark.parametrize("spelling", [s for s in SPECS if SPECS[s].scale != "dq" and s != "udynamic8:g64"])
def test_no_weight_is_further_off_than_half_the_largest_step_of_its_group(spelling):
    spec = SPECS[spelling]
    weight = torch.randn(9, 320)
    values = weight.double().numpy().ravel()
    groups = group_numbers(spec, (9, 320))
    low, high = group_extremes(values, groups)
    absmax = np.maximum(high, -low)
    table = np.unique(spec.values[~np.isnan(spec.values)].astype(np.float64))
    step = np.diff(table).max() / np.abs(table).max()
    bound = absmax * step / 2
    if spec.zero:
        bound = (np.maximum(high, 0) - np.minimum(low, 0)) / (2**spec.bits - 1)  # the zero point rounds, too
    elif spec.scale == "e8m0":
        bound = absmax / 4  # up to 8 units saturate at 6
    elif spec.offset:
        bound = bound * 1.2
    elif spec.scale != torch.float32:
        bound = bound * 1.1 + absmax * 0.07
    elif not spec.stores_absmax and spelling.startswith("int"):
        bound = absmax / (2**spec.bits - 1)
    decoded = dequantize(quantize(weight, Format.parse(spelling)), torch.float64)
    error = np.abs(decoded.numpy().ravel() - values)
    assert (error <= bound[groups] * 1.0001).all()


@every_format
def test_the_size_of_working_blocks_changes_no_bit(spelling, monkeypatch):
    weight, format = torch.randn(37, 143), Format.parse(spelling)
    whole = quantize(weight, format)
    decoded = dequantize(whole, torch.bfloat16)
    for block in (1, 150, 1000):
        monkeypatch.setattr(reference, "_BLOCK", block)
        assert quantize(weight, format) == whole
        assert torch.equal(dequantize(whole, torch.bfloat16), decoded)


@every_format
def test_quantizing_twice_gives_the_same_bits_and_leaves_the_weight_alone(spelling):
    weight = torch.randn(5, 257)
    before = weight.clone()
    assert quantize(weight, Format.parse(spelling)) == quantize(weight, Format.parse(spelling))
    assert torch.equal(weight, before)


# Whose scales reproduce themselves: the absolute maximum, of either sign, has a code of its own.
STABLE = ["nf4:g64", "fp4:g64", "int8:row", "int8:tensor", "mxfp4:g32"]


@pytest.mark.parametrize("spelling", STABLE)
@pytest.mark.parametrize("shape", [(5, 257), (3, 5, 33)])
def test_decoded_weights_quantize_to_themselves(spelling, shape):
    once = dequantize(quantize(torch.randn(shape), Format.parse(spelling)), torch.float32)
    twice = dequantize(quantize(once, Format.parse(spelling)), torch.float32)
    assert torch.allclose(once, twice, rtol=1e-6, atol=0)


@every_format
@pytest.mark.parametrize("columns", [33, 64])
def test_embedding_gives_the_bits_of_decoded_rows(spelling, columns):
    weight = quantize(torch.randn(21, columns), Format.parse(spelling))
    nothing = torch.empty(2, 0, dtype=torch.long)
    for indices in (torch.tensor([[0, 20, 7], [7, 7, 1]]), torch.tensor(5), nothing):
        rows = embedding(indices, weight, torch.float16)
        assert torch.equal(rows, dequantize(weight, torch.float16)[indices])


@every_format
def test_linear_and_its_gradient_multiply_with_decoded_weights(spelling):
    weight = quantize(torch.randn(11, 65), Format.parse(spelling))
    decoded = dequantize(weight, torch.float64).numpy()
    x, grad, bias = torch.randn(2, 3, 65), torch.randn(2, 3, 11), torch.randn(11)
    truth = x.double().numpy() @ decoded.T + bias.double().numpy()
    np.testing.assert_allclose(linear(x, weight, bias).numpy(), truth, rtol=1e-4, atol=1e-4)
    truth = grad.double().numpy() @ decoded
    np.testing.assert_allclose(linear_backward(grad, weight).numpy(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_reach_the_last_group():
    rows, columns = 2**15 + 1, 2**16
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16)
    weight[-1, -64:] = torch.linspace(-2, 2, 64, dtype=torch.bfloat16)
    weight[-1, 100] = -3.0
    weight[0, 0] = 1.0
    last = weight[-1].clone()
    quantized = quantize(weight, Format.parse("nf4:g64"))
    del weight
    assert quantized.codes.numel() == rows * columns // 2 > 2**30
    assert quantized.scale.nonzero().view(-1).tolist() == [0, (rows - 1) * 1024 + 1, rows * 1024 - 1]
    assert quantized.scale[[0, -1023, -1]].tolist() == [1.0, 3.0, 2.0]
    expected = quantize(last, Format.parse("nf4:g64"))
    assert torch.equal(quantized.codes[-columns // 2 :], expected.codes)
    rows_asked = embedding(torch.tensor([rows - 1, 0]), quantized, torch.float32)
    assert torch.equal(rows_asked[0], dequantize(expected, torch.float32))
    assert rows_asked[1].nonzero().view(-1).tolist() == [0]
    grid = np.unique(np.array(NF4, dtype=np.float32))
    assert set((rows_asked[0, -64:] / 2).tolist()) <= set(grid.tolist())

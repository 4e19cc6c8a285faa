"""Codes, scales and decoded weights equal those of an installed bitsandbytes, bit for bit.

Where its CPU path departs from its own CUDA semantics or from the formula, the test says so and checks the
formula instead.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fewbits.codebook import CODEBOOKS
from fewbits.ops import linear, quantize
from fewbits.tensor import QuantizedTensor

pytestmark = pytest.mark.parity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
FP4_ORDER = np.argsort(FP4)
FP4_CUDA = np.float32([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
SHAPES = [(4096,), (64, 256), (3, 4096), (16, 8, 128), (8, 4097)]


@pytest.fixture(scope="module")
def bnb() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def full_blocks(weight: torch.Tensor, block: int) -> int:
    """Weights in whole blocks: bitsandbytes' CPU path divides in the last, partial one, CUDA multiplies."""
    return weight.numel() // block * block


def nibbles(packed: torch.Tensor) -> np.ndarray:
    flat = packed.reshape(-1).numpy()
    return np.stack([flat >> 4, flat & 15], 1).reshape(-1)


def scaled(weight: torch.Tensor, block: int) -> np.ndarray:
    """float32 weights over the absolute maximum of their block, by multiplying with its reciprocal."""
    flat = weight.float().reshape(-1).numpy()
    padded = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    reciprocal = np.float32(1) / np.abs(padded).max(1, keepdims=True).clip(np.float32(1e-38))
    return (padded * reciprocal).reshape(-1)[: len(flat)]


def cuda_fp4_codes(values: np.ndarray) -> np.ndarray:
    rank = np.searchsorted(FP4_CUDA, np.abs(values), side="left")
    return np.where(values < 0, 8, 0) + FP4_ORDER[rank]


def nf4_codes(values: np.ndarray) -> np.ndarray:
    table = np.array(CODEBOOKS["nf4"].values, dtype=np.float32)
    middles = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    return np.searchsorted(middles, values, side="left")


# --- 4 bit ------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_codes_and_scales_are_equal(bnb, shape, block, dtype):
    weight = torch.randn(shape).to(dtype)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    mine = quantize(weight, f"nf4:g{block}")
    assert mine.codes.shape == theirs.shape
    assert torch.equal(mine.scale, state.absmax)
    whole = full_blocks(weight, block) // 2
    assert torch.equal(mine.codes[:whole], theirs[:whole])
    # The partial block: CUDA semantics.
    count = weight.numel()
    assert np.array_equal(nibbles(mine.codes)[:count], nf4_codes(scaled(weight, block)))


@every_dtype
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp4_codes_follow_cuda_and_scales_and_decoded_values_are_equal(bnb, shape, block, dtype):
    # The CPU path gives code 8 to positives up to 0.0026, code 0 to such negatives, and the larger magnitude
    # to negative ties; CUDA does not.
    weight = torch.randn(shape).to(dtype)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="fp4")
    mine = quantize(weight, f"fp4:g{block}")
    assert torch.equal(mine.scale, state.absmax)
    values, count = scaled(weight, block), weight.numel()
    codes, their_codes = nibbles(mine.codes)[:count], nibbles(theirs)[:count]
    assert np.array_equal(codes, cuda_fp4_codes(values))
    whole = full_blocks(weight, block)
    differ = (codes != their_codes)[:whole]
    zeros = np.isin(codes, (0, 8)) & np.isin(their_codes, (0, 8))
    distance = np.abs(np.abs(values)[:, None] - FP4_CUDA).min(1)
    assert (zeros | (distance < 5e-7))[:whole][differ].all()
    assert differ.mean() < 0.02


@every_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_what_bitsandbytes_stored_decodes_to_the_same_bits(bnb, kind, block, dtype):
    weight = torch.randn(16, 4096).to(dtype)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    mine = QuantizedTensor.from_parts([codes, state.absmax], f"{kind}:g{block}", weight.shape, dtype)
    truth = bnb.functional.dequantize_4bit(codes, state)
    assert truth.dtype == mine.dequantize().dtype
    assert torch.equal(mine.dequantize(), truth)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(10, 48), (5, 257), (3, 33), (7, 80)], ids=str)
def test_rows_that_are_no_whole_blocks_decode_by_the_formula(bnb, kind, shape):
    # Its AVX-512 path takes scales by row where the last dimension is a multiple of 16 but not of the block
    # size, so its own decoded values are wrong there: the table and scales are the truth.
    weight = torch.randn(shape)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    mine = QuantizedTensor.from_parts([codes, state.absmax], f"{kind}:g64", shape).dequantize()
    table = state.code.numpy()
    scale = np.repeat(state.absmax.numpy(), 64)[: weight.numel()]
    truth = (table[nibbles(codes)[: weight.numel()]] * scale).reshape(shape)
    assert np.array_equal(mine.numpy(), truth)


@every_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"), [((64, 256), 64), ((300, 128), 64), ((512, 512), 32), ((64, 64), 4096)]
)
def test_double_quantization_stores_and_decodes_the_same(bnb, kind, shape, block, dtype):
    weight = torch.randn(shape).to(dtype)
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=True
    )
    mine = quantize(weight, f"{kind}:g{block}:dq")
    # Its mean depends on the number of threads and on the vector width; ours is the same everywhere.
    ulp = float(np.spacing(np.float32(state.offset)))
    assert abs(mine.scale.offset.item() - state.offset.item()) <= 2 * ulp
    assert (mine.scale.scale - state.state2.absmax).abs().max() <= 3 * ulp
    if kind == "nf4":
        assert torch.equal(mine.codes, codes)
    # Its CPU lookup of 65,536 bins takes another code now and then, most of all near 0; CUDA the nearest.
    check_nearest(mine.scale.codes.numpy(), state.absmax.numpy(), state, weight, block)
    stored = {
        "codes": codes,
        "scale.codes": state.absmax,
        "scale.scale": state.state2.absmax,
        "scale.offset": state.offset.reshape(1),
    }
    read = QuantizedTensor.from_parts(stored, f"{kind}:g{block}:dq", shape, dtype)
    assert torch.equal(read.dequantize(), bnb.functional.dequantize_4bit(codes, state))


def check_nearest(mine: np.ndarray, theirs: np.ndarray, state: Any, weight: torch.Tensor, block: int) -> None:
    absmax = weight.float().reshape(-1, block).abs().amax(1).numpy()
    rest = absmax - np.float32(state.offset)
    inner = np.repeat(state.state2.absmax.numpy(), 256)[: len(rest)]
    table = state.state2.code.numpy().astype(np.float64)
    mine, theirs, rest, inner = (each[inner > 0] for each in (mine, theirs, rest, inner))
    exact = rest.astype(np.float64) / inner  # a lone scale is its own mean: any code will do
    nearest = np.abs(exact[:, None] - table).min(1)
    assert (np.abs(table[mine] - exact) <= nearest + 1e-6).all()
    differ = mine != theirs
    assert (np.abs(table[mine] - exact) <= np.abs(table[theirs] - exact) + 1e-6)[differ].all()
    assert (np.abs(table[mine] - table[theirs])[differ] <= np.diff(table).max()).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_groups_of_zeros_decode_to_zeros(bnb, kind, nested):
    # CUDA meets 0 · inf = NaN and stores code 0, which decodes to -0 in NF4; zeros are zeros here.
    weight = torch.randn(64, 64)
    weight[3:9] = 0
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    mine = quantize(weight, f"{kind}:g64")
    assert torch.equal(mine.scale, state.absmax)
    assert torch.equal(mine.codes.view(64, 32)[3:9], codes.view(64, 32)[3:9])
    if nested:
        mine = quantize(weight, f"{kind}:g64:dq")
    assert torch.equal(mine.dequantize()[3:9], torch.zeros(6, 64))


# --- 8 bit ------------------------------------------------------------------------------------------


def test_the_tables_are_equal(bnb):
    functional = bnb.functional
    tables = {
        "nf4": functional.get_4bit_type("nf4", device="cpu"),
        "fp4": functional.get_4bit_type("fp4", device="cpu"),
        "dynamic8": functional.create_dynamic_map(signed=True),
        "udynamic8": functional.create_dynamic_map(signed=False),
    }
    for name, table in tables.items():
        mine = torch.tensor(CODEBOOKS[name].values)
        assert torch.equal(mine.view(torch.int32)[table != 0], table.view(torch.int32)[table != 0]), name
        assert torch.equal(mine, table), name


@pytest.mark.parametrize(("name", "signed"), [("dynamic8", True), ("udynamic8", False)])
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_blockwise_8_bit_takes_the_nearest_code_where_the_cpu_lookup_is_coarse(bnb, name, signed, block):
    table = bnb.functional.create_dynamic_map(signed=signed)
    weight = torch.randn(16, 4096)
    weight = weight if signed else weight.abs()
    theirs, state = bnb.functional.quantize_blockwise(weight, code=table, blocksize=block)
    mine = quantize(weight, f"{name}:g{block}")
    assert torch.equal(mine.scale, state.absmax)
    exact = scaled(weight, block).astype(np.float64)
    values = table.numpy().astype(np.float64)
    my_error = np.abs(values[mine.codes.numpy().ravel()] - exact)
    their_error = np.abs(values[theirs.numpy().ravel()] - exact)
    assert (my_error <= their_error + 1e-7).all()
    right = np.searchsorted(values, exact).clip(1, 255)
    nearest = np.minimum(np.abs(values[right] - exact), np.abs(values[right - 1] - exact))
    assert (my_error <= nearest + 1e-7).all()
    read = QuantizedTensor.from_parts([theirs, state.absmax], f"{name}:g{block}", weight.shape)
    assert torch.equal(read.dequantize(), bnb.functional.dequantize_blockwise(theirs, state))


@pytest.mark.parametrize("shape", [(64, 128), (5, 257), (1, 1), (33, 4096)], ids=str)
def test_int8_codes_and_scales_equal_those_for_float16_weights(bnb, shape):
    weight = torch.randn(shape).half()
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight)
    mine = quantize(weight, "int8:row")
    assert torch.equal(mine.codes, codes)
    assert torch.equal(mine.scale.view(-1), scale)
    decoded = bnb.functional.int8_vectorwise_dequant(codes, scale)
    assert torch.equal(mine.dequantize(torch.float32), decoded)


def test_int8_keeps_weights_beyond_float16_that_bitsandbytes_loses(bnb):
    # It casts to float16 first: beyond 65504 the scale is infinite and the row becomes zeros.
    weight = torch.randn(4, 64) * 1e5
    mine = quantize(weight, "int8:row").dequantize()
    assert (mine - weight).norm() < 0.01 * weight.norm()


def int8_truth(x, codes, absmax, bias, threshold: float, cast: torch.dtype) -> np.ndarray:
    """arXiv 2208.07339 in float64, for inputs that were rounded to `cast`."""
    rows = x.to(cast).float().numpy()
    outlier = np.abs(rows) >= threshold
    columns = outlier.any(0)
    largest = np.abs(np.where(outlier, 0, rows)).max(1, keepdims=True)
    codes_x = np.rint(np.where(outlier, np.float32(0), rows) * (np.float32(127) / largest))
    codes_x[:, columns] = 0
    integer = codes_x.astype(np.int64) @ codes.numpy().astype(np.int64).T
    y = integer * (largest.astype(np.float64) * absmax.double().numpy()) / 127**2
    decoded = codes[:, columns].double().numpy() * absmax.double().numpy()[:, None] / 127
    return y + x.double().numpy()[:, columns] @ decoded.T + bias.double().numpy()


def errors(bnb: Any, dtype: torch.dtype) -> dict[str, float]:
    """Squared errors over seeds: against the formula on one's own codes, and against the float layer."""
    sums = dict.fromkeys(("mine, formula", "theirs, formula", "mine, float", "theirs, float"), 0.0)
    for seed in range(12):
        torch.manual_seed(seed)
        source = nn.Linear(256, 96).to(dtype).requires_grad_(False)
        theirs = bnb.nn.Linear8bitLt(256, 96, has_fp16_weights=False, threshold=6.0)
        theirs.load_state_dict(source.state_dict())
        theirs = theirs.to("cpu").eval()
        theirs.bias.data = theirs.bias.data.to(dtype)
        x = torch.randn(24, 256)
        x[:, torch.randperm(256)[:3]] *= 8
        x = x.to(dtype)
        weight = quantize(source.weight, "int8:row")
        with torch.no_grad():
            y, their_y = linear(x, weight, source.bias, activation="int8:t6"), theirs(x)
        truth = int8_truth(x, weight.codes, weight.scale.view(-1), source.bias, 6.0, dtype)
        their_codes, their_scale, _ = bnb.functional.int8_vectorwise_quant(source.weight.half())
        their_truth = int8_truth(x, their_codes, their_scale, source.bias, 6.0, torch.float16)
        dense = x.double().numpy() @ source.weight.double().numpy().T + source.bias.double().numpy()
        for name, result, wanted in (
            ("mine, formula", y, truth),
            ("theirs, formula", their_y, their_truth),
            ("mine, float", y, dense),
            ("theirs, float", their_y, dense),
        ):
            sums[name] += float(np.square(result.double().numpy() - wanted).sum())
    return sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_llm_int8_is_no_further_from_the_truth_than_bitsandbytes(bnb, dtype):
    sums = errors(bnb, dtype)
    assert 0 < sums["mine, formula"] <= sums["theirs, formula"]
    # Against the float layer both bear the same rounding to int8; the rest must not add to it.
    assert 0 < sums["mine, float"] <= sums["theirs, float"] * 1.001


@pytest.mark.parametrize("rows", [1, 7])
def test_llm_int8_stays_closer_to_the_formula_in_float32_than_the_constant_of_its_cpu_path(bnb, rows):
    # Its CPU path multiplies with 6.200124e-05 for 1/127² = 6.2000124e-05.
    x, weight = torch.randn(rows, 512), quantize(torch.randn(64, 512), "int8:row")
    y = linear(x, weight, activation="int8").double().numpy()
    truth = int8_truth(x, weight.codes, weight.scale.view(-1), torch.zeros(64), math.inf, torch.float32)
    typo = truth * 6.200124e-05 * 127**2
    assert np.abs(y - truth).max() < 0.1 * np.abs(typo - truth).max()

"""LLM.int8() of the reference against the paper's formula in float64, and against sums of integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.format import Format
from fewbits.reference import dequantize, linear_int8, quantize


def int8_truth(x, codes, absmax, bias, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(y, sum of magnitudes) in float64 by arXiv 2208.07339, for x as it was given."""
    rows = x.reshape(-1, x.shape[-1]).float().numpy()
    outlier = np.abs(rows) >= threshold if threshold > 0 else np.zeros(rows.shape, bool)
    columns = outlier.any(0) if len(rows) else np.zeros(rows.shape[1], bool)
    inliers = np.where(outlier, np.float32(0), rows)
    largest = np.abs(inliers).max(1, keepdims=True, initial=0)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded = np.rint(inliers * factor)
    rounded[:, columns] = 0
    integer = rounded.astype(np.int64) @ codes.numpy().astype(np.int64).T
    y = integer * (largest.astype(np.float64) * absmax.double().numpy()) / 127**2
    size = np.abs(y)
    weight = (codes[:, columns].double() * absmax.double().view(-1, 1) / 127).to(x.dtype).double().numpy()
    part = rows[:, columns].astype(np.float64) @ weight.T
    y, size = y + part, size + np.abs(rows[:, columns]).astype(np.float64) @ np.abs(weight.T)
    if bias is not None:
        y, size = y + bias.double().numpy(), size + np.abs(bias.double().numpy())
    shape = (*x.shape[:-1], len(codes))
    return y.reshape(shape), size.reshape(shape)


def check_int8(x, weight, bias, threshold: float) -> None:
    result = linear_int8(x, weight, bias, threshold)
    truth, size = int8_truth(x, weight.codes, weight.scale.view(-1), bias, threshold)
    assert result.dtype == x.dtype
    assert result.shape == truth.shape
    info = torch.finfo(x.dtype)
    # One rounding to the output dtype, and a few to float32; decoded outlier weights within one of theirs.
    one = np.maximum(np.abs(truth) * info.eps / 2, info.smallest_normal * info.eps)
    few = 2e-6 * size + (info.eps * 0.02 * size if threshold else 0)
    assert (np.abs(result.double().numpy() - truth) <= one * 1.001 + few).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0, 1e-9, 1e9])
@pytest.mark.parametrize("shape", [(65,), (1, 65), (7, 65), (2, 3, 65), (2, 1, 3, 65)], ids=str)
def test_llm_int8_equals_the_papers_formula_within_one_rounding(shape, threshold, dtype):
    weight = quantize(torch.randn(33, 65), Format.parse("int8:row"))
    x = torch.randn(shape)
    x[..., 5] *= 12
    x[..., 40:43] *= 4
    bias = torch.randn(33).to(dtype)
    check_int8(x.to(dtype), weight, bias, threshold)
    check_int8(x.to(dtype), weight, None, threshold)


def test_llm_int8_takes_out_columns_at_the_threshold_itself():
    weight = quantize(torch.randn(4, 8), Format.parse("int8:row"))
    x = torch.full((1, 8), 0.01)
    x[0, 3] = 6.0
    kept = linear_int8(x, weight, None, 6.0)
    truth = x.double() @ dequantize(weight, torch.float64).T
    assert torch.allclose(kept.double(), truth, rtol=1e-3, atol=1e-4)
    lost = linear_int8(x, weight, None, 6.001)  # the small ones drown beside 6
    assert (lost.double() - truth).abs().max() > 10 * (kept.double() - truth).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_of_zero_rows_and_of_no_rows(dtype, threshold):
    weight = quantize(torch.randn(5, 40), Format.parse("int8:row"))
    bias = torch.randn(5).to(dtype)
    x = torch.randn(3, 40).to(dtype)
    x[1] = 0
    check_int8(x, weight, bias, threshold)
    assert torch.equal(linear_int8(x, weight, bias, threshold)[1], bias)
    assert linear_int8(x[:0], weight, bias, threshold).shape == (0, 5)
    assert linear_int8(x.view(1, 3, 40)[:, :0], weight, bias, threshold).shape == (1, 0, 5)


def test_llm_int8_of_zero_weight_rows_is_the_bias():
    dense = torch.randn(5, 40)
    dense[2] = 0
    weight, bias = quantize(dense, Format.parse("int8:row")), torch.randn(5)
    assert torch.equal(linear_int8(torch.randn(3, 40), weight, bias, 6.0)[:, 2], bias[2].expand(3))


@pytest.mark.parametrize("columns", [1, 127, 1024, 1025, 2049, 4096, 5000])
def test_the_integer_product_is_exact_for_extreme_codes(columns):
    signs = torch.randint(0, 2, (6, columns)) * 2.0 - 1
    signs[0] = 1
    signs[1, columns // 2 :] = -1  # climbs to 127² · columns/2 and back
    signs[1, : columns // 2] = 1
    inputs = torch.randint(-127, 128, (5, columns)).float()
    inputs[0], inputs[1] = 127, -127
    inputs[2] = 127 - torch.arange(columns) % 3
    inputs[2:, 0] = 127
    weight = quantize(signs, Format.parse("int8:row"))  # codes ±127, scale 1
    assert set(weight.codes.unique().tolist()) <= {-127, 127}
    exact = inputs.long() @ (signs.long() * 127).T
    result = linear_int8(inputs, weight, None, 0.0).double() * 127  # absmax 127: codes are the inputs
    assert torch.allclose(result, exact.double(), rtol=3e-7, atol=1e-4)
    small = exact.abs() < 2**22  # beyond, float32 rounds the exact sum
    assert small[1:].any()
    assert torch.equal(result[small].round().long(), exact[small])


@pytest.mark.parametrize("code", [127, -128])
@pytest.mark.parametrize("columns", [132_104, 132_105, 140_000])
def test_sums_are_exact_beyond_32_bits(columns: int, code: int) -> None:
    """The largest codes everywhere; 127 · 128 · 132 104 is the last sum below 2³¹."""
    weight = quantize(torch.ones(2, columns), Format.parse("int8:row"))
    weight.codes.fill_(code)
    result = linear_int8(torch.full((3, columns), 2.0), weight, None, 0.0)
    assert torch.allclose(result, torch.full((3, 2), 2.0 * columns * code / 127), rtol=1e-6)

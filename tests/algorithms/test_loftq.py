"""LoftQ against its definition: quantize and decompose by turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.algorithms.loftq import loftq

FORMATS = ["nf4:g64", "nf4:g64:dq", "int4:g32:zero", "int8:row", "fp4:g64", "mxfp4", "int2:g32:zero"]


def outlier_matrix(rows: int, columns: int) -> Tensor:
    """Random, with a few strong directions and columns, as weights of language models have."""
    weight = torch.randn(rows, columns) * 0.02
    weight += 0.1 * torch.randn(rows, 3) @ torch.randn(3, columns)
    weight[:, ::37] *= 8
    return weight


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(96, 128), (70, 192)])
def test_one_iteration_is_the_best_low_rank_part_of_what_quantizing_loses(
    format: str, shape: tuple[int, int]
) -> None:
    weight = outlier_matrix(*shape)
    found = loftq(weight, format, 8)
    plain = fewbits.quantize(weight, format)
    assert found.quantized == plain
    residual = weight - plain.dequantize()
    assert found.relative_errors[0] == pytest.approx(float(residual.norm() / weight.norm()), rel=1e-5)
    # Eckart and Young: what is left are the other singular values.
    left = torch.linalg.svdvals(residual)[8:].norm() / weight.norm()
    assert found.relative_errors[1] == pytest.approx(float(left), rel=1e-3)
    error = (weight - found.quantized.dequantize() - found.b @ found.a).norm() / weight.norm()
    assert float(error) == pytest.approx(found.relative_errors[1], rel=1e-4)


@pytest.mark.parametrize("format", ["nf4:g64", "int2:g32:zero"])
def test_the_best_iteration_is_returned(format: str) -> None:
    weight = outlier_matrix(96, 128)
    found = loftq(weight, format, 16, iterations=5)
    assert len(found.relative_errors) == 6
    assert min(found.relative_errors) < found.relative_errors[1] < found.relative_errors[0]
    error = (weight - found.quantized.dequantize() - found.b @ found.a).norm() / weight.norm()
    assert float(error) == pytest.approx(min(found.relative_errors), rel=1e-4)


def test_a_large_matrix_is_decomposed_at_random_but_repeatably() -> None:
    weight = outlier_matrix(1100, 1088)
    torch.manual_seed(1)
    first = loftq(weight, "nf4:g64", 16)
    state = torch.get_rng_state()
    second = loftq(weight, "nf4:g64", 16)
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)
    assert torch.equal(state, torch.get_rng_state())
    best = torch.linalg.svdvals(weight - first.quantized.dequantize())[16:].norm() / weight.norm()
    assert first.relative_errors[1] == pytest.approx(float(best), rel=0.01)


def test_16_bit_weights_and_zeros() -> None:
    weight = outlier_matrix(64, 64).bfloat16()
    found = loftq(weight, "nf4:g64", 4)
    assert found.a.dtype == found.b.dtype == torch.float32
    assert found.relative_errors[1] < found.relative_errors[0]
    assert loftq(torch.zeros(64, 64), "nf4:g64", 4).relative_errors == (0.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "rank", "iterations", "message"),
    [
        ((64, 32), 33, 1, "rank 33"),
        ((64, 32), 0, 1, "rank 0"),
        ((2, 64, 32), 4, 1, r"\[2, 64, 32\]"),
        ((64, 32), 4, 0, "at least one iteration"),
    ],
)
def test_what_has_no_factors_is_refused(
    shape: tuple[int, ...], rank: int, iterations: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loftq(torch.randn(shape), "nf4:g64", rank, iterations=iterations)


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer\.7"):
        loftq(torch.full((64, 64), torch.nan), "nf4:g64", 4, name="layer.7")

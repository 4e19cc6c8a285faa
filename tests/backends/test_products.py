"""Products of the CPU library, on every instruction set: near the exact one, or the reference's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fewbits import backends, reference
from fewbits.backends.cpu import codes, products
from fewbits.format import Format, Scheme
from fewbits.ops import fixed_linear, linear
from fewbits.tensor import QuantizedTensor

Each = Callable[[], Iterator[str]]
# [out, in]: below one vector and tile, not divisible by them, groups that straddle rows.
SHAPES = [(1, 1), (3, 5), (17, 64), (16, 72), (37, 200), (33, 1160), (50, 4304)]
# Rows of x: each kernel of few rows, blocks that are full and not, more blocks than are fetched ahead for.
ROWS = [0, 1, 2, 3, 4, 5, 12, 13, 30, 45]
FUSED = ["nf4:g64", "fp4:g32:dq", "int4:g128", "int4:g32:f16:zero", "int3:g64:zero", "int2:g16", "mxfp4:g32"]
MOST_INT8_COLUMNS = (2**31 - 1) // (127 * 128)  # that csrc/linear.cpp multiplies
# Relative to the product of the magnitudes. bfloat16: the codebook is rounded as well.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def weight_of(format: Format | str, shape: tuple[int, int]) -> QuantizedTensor:
    parsed = Format.parse(format) if isinstance(format, str) else format
    return reference.quantize(torch.randn(shape) * 0.02, parsed)


def error(y: Tensor, x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> float:
    """‖y - exact‖ ÷ ‖exact‖; a product of nothing has none."""
    exact = x.double() @ reference.dequantize(weight, torch.float32).double().T
    exact = exact if bias is None else exact + bias.double()
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-30)) if y.numel() else 0.0


def test_every_format_is_multiplied(format: Format, each: Each) -> None:
    for shape in SHAPES:
        weight = weight_of(format, shape)
        for dtype, bound in BOUNDS.items():
            for rows in (1, 7):
                x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
                for isa in each():
                    for given in (None, bias):
                        y = products.linear(x, weight, given)
                        assert error(y, x, weight, given) < bound, (isa, shape, dtype, rows)


@pytest.mark.parametrize("spelling", FUSED)
def test_any_number_of_rows(spelling: str, each: Each) -> None:
    for shape in ((37, 200), (33, 1160), (64, 256)):
        weight = weight_of(spelling, shape)
        for dtype, bound in BOUNDS.items():
            for rows in ROWS:
                x = torch.randn(rows, shape[1]).to(dtype)
                for isa in each():
                    assert error(products.linear(x, weight, None), x, weight) < bound, (
                        isa,
                        shape,
                        dtype,
                        rows,
                    )


def test_panels(format: Format, each: Each) -> None:
    weight = weight_of(format, (70, 136))
    for dtype, bound in BOUNDS.items():
        x, bias = torch.randn(9, 136).to(dtype), torch.randn(70).to(dtype)
        for isa in each():
            y = products._linear_by_panels(x, weight, bias)
            assert error(y, x, weight, bias) < bound, (isa, dtype)


def test_several_panels(each: Each, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PANEL_BYTES", 2**14)
    monkeypatch.setattr(products, "_kept", threading.local())
    weight = weight_of("nf4:g64", (300, 192))
    for dtype, bound in BOUNDS.items():
        x, grad = torch.randn(11, 192).to(dtype), torch.randn(2, 3, 300).to(dtype)
        decoded = reference.dequantize(weight, torch.float32).double()
        for isa in each():
            assert error(products._linear_by_panels(x, weight, None), x, weight) < bound, (isa, dtype)
            back = products.linear_backward(grad, weight)
            wanted = grad.double() @ decoded
            assert back.dtype == dtype
            assert float((back.double() - wanted).norm() / wanted.norm()) < bound, (isa, dtype)


def test_the_gradient_of_every_format(format: Format, each: Each) -> None:
    weight = weight_of(format, (37, 200))
    decoded = reference.dequantize(weight, torch.float32).double()
    for dtype, bound in BOUNDS.items():
        grad = torch.randn(4, 37).to(dtype)
        wanted = grad.double() @ decoded
        for isa in each():
            back = products.linear_backward(grad, weight)
            assert float((back.double() - wanted).norm() / wanted.norm()) < bound, (isa, dtype)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_products_are_the_references(threshold: float, each: Each) -> None:
    for shape in SHAPES:
        weight = weight_of("int8:row", shape)
        for dtype, bound in BOUNDS.items():
            for rows in ROWS:
                x = torch.randn(rows, shape[1])
                x[:, : min(7, shape[1] - 1)] *= 9.0  # any number of outliers, but not everywhere
                x, bias = x.to(dtype), torch.randn(shape[0]).to(dtype)
                wanted = reference.linear_int8(x, weight, bias, threshold).double()
                for isa in each():
                    y = products.linear_int8(x, weight, bias, threshold).double()
                    gap = float((y - wanted).norm() / wanted.norm().clamp(min=1e-30)) if rows else 0.0
                    assert gap < bound / 4, (isa, shape, dtype, rows)


def test_int8_products_do_not_depend_on_the_instruction_set(each: Each) -> None:
    weight = weight_of("int8:row", (50, 520))
    for rows in (1, 6, 7, 40):
        x = torch.randn(rows, 520)
        results = [products.linear_int8(x, weight, None, 0.0) for _ in each()]
        assert all(torch.equal(one, results[0]) for one in results), rows


def test_int8_products_in_several_rounds(each: Each) -> None:
    rows, columns = 140, 4304
    assert rows * columns > 2**19, "x stays in the second cache as a whole"
    weight, bias = weight_of("int8:row", (50, columns)), torch.randn(50)
    x = torch.randn(rows, columns)
    x[:, :5] *= 9.0
    wanted = reference.linear_int8(x, weight, bias, 6.0).double()
    for isa in each():
        y = products.linear_int8(x, weight, bias, 6.0).double()
        assert float((y - wanted).norm() / wanted.norm()) < BOUNDS[torch.float32] / 4, isa


@pytest.mark.parametrize("code", [127, -128])
@pytest.mark.parametrize("columns", [MOST_INT8_COLUMNS, MOST_INT8_COLUMNS + 1, 140_000])
def test_int8_products_of_very_many_columns(columns: int, code: int, each: Each) -> None:
    """The largest codes everywhere: 32 bits do not hold more of their products than MOST_INT8_COLUMNS."""
    weight = reference.quantize(torch.ones(3, columns), Format.parse("int8:row"))
    weight.codes.fill_(code)
    for rows in (1, 20):
        x, wanted = torch.full((rows, columns), 2.0), torch.full((rows, 3), 2.0 * columns * code / 127)
        for isa in each():
            y = products.linear_int8(x, weight, None, 0.0)
            assert torch.allclose(y, wanted, rtol=1e-6), (isa, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_x_that_is_not_finite_stays_alone(value: float, each: Each) -> None:
    weight = weight_of("int8:row", (40, 100))
    for rows in (3, 20):
        x = torch.randn(rows, 100)
        x[1, 5] = value
        for isa in each():
            y = products.linear_int8(x, weight, None, 0.0)
            finite = y.isfinite().all(1)
            assert not finite[1], isa
            assert finite.sum() == rows - 1, isa


@pytest.mark.parametrize("spelling", ["nf4:g64", "fp4:g32", "int4:g64:f16:zero", "int3:g128", "int2:g64"])
@pytest.mark.parametrize("group", [0, 32, 64])
def test_int8_activations(spelling: str, group: int, each: Each) -> None:
    for shape in ((37, 192), (64, 1024), (20, 1160)):
        weight = weight_of(spelling, shape)
        for rows in (1, 4, 9, 30):
            for dtype in BOUNDS:
                x = torch.randn(rows, shape[1]).to(dtype)
                rounded = reference.rounded_to_int8(x, group)
                for isa in each():
                    y = products.linear_a8(x, weight, None, group)
                    # int8 steps of the codebook: 1 of 254 of its range.
                    assert error(y, rounded, weight) < 0.015, (isa, shape, rows, dtype)


def test_strided_inputs_and_leading_dimensions(each: Each) -> None:
    weight = weight_of("nf4:g64", (48, 256))
    x = torch.randn(2, 5, 512)[:, :, ::2]
    for isa in each():
        y = products.linear(x, weight, torch.randn(96)[::2].contiguous())
        assert y.shape == (2, 5, 48)
        assert error(products.linear(x, weight, None), x, weight) < 2e-6, isa


def test_one_thread_and_several_give_the_same(each: Each) -> None:
    weight, x = weight_of("nf4:g64", (200, 512)), torch.randn(20, 512, dtype=torch.bfloat16)
    for isa in each():
        results = []
        for threads in (1, 2, 5):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                results.append(products.linear(x, weight, None))
            finally:
                torch.set_num_threads(before)
        assert all(torch.equal(one, results[0]) for one in results), isa


def test_where_new_tensors_go_by_default_does_not_matter() -> None:
    weight = weight_of("nf4:g64", (70, 128))
    for rows in (2, 700):
        x = torch.randn(rows, 128)
        with torch.device("meta"):
            y, back = products.linear(x, weight, None), products.linear_backward(x[:, :70], weight)
            assert codes.quantize(x, weight.format).codes.is_cpu
            assert codes.dequantize(weight, torch.bfloat16).is_cpu
        assert y.is_cpu
        assert back.is_cpu
        assert error(y, x, weight) < BOUNDS[torch.float32]


def test_inference_mode_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_kept", threading.local())
    weight = weight_of("nf4:g64", (70, 128))
    with torch.inference_mode():
        linear(torch.randn(700, 128), weight)
    x = torch.randn(700, 128, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert error(linear(x.detach(), weight), x.detach(), weight) < BOUNDS[torch.float32]


# --- short ways -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["nf4:g64", "nf4:g64:dq", "nf4:g64@int8:g64", "int8:row@int8:t6"])
def test_the_short_way_is_the_long_one(spelling: str) -> None:
    if backends.explain("nf4:g64")["linear"].get("cpu") != "used":
        pytest.skip("no CPU kernels here")
    scheme, bias = Scheme.parse(spelling), torch.randn(96, dtype=torch.bfloat16)
    weight = weight_of(scheme.weight, (96, 256))
    short = fixed_linear(weight, bias, scheme)
    assert short is not None
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    activation = spelling.partition("@")[2] or None
    long = linear(x.clone().requires_grad_(), weight, bias, activation=activation)
    found = short(x)
    assert found is not None
    assert torch.equal(found, long)
    assert torch.equal(linear(x, weight, bias, activation=activation), long)


def test_wrong_inputs_are_refused_on_the_short_way_too() -> None:
    weight = weight_of("nf4:g64", (96, 256))
    with pytest.raises(ValueError, match="last dimension fits"):
        linear(torch.randn(3, 255), weight)
    with pytest.raises(ValueError, match=r"takes a bias \[96\]"):
        linear(torch.randn(3, 256), weight, torch.randn(95))

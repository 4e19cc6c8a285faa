"""The ops inside torch: schemas, tracing, gradients, what is kept for them, and errors."""

import pytest
import torch

from fewbits import backends, ops
from fewbits.ops import dequantize, embedding, linear, quantize
from fewbits.reference import rounded_to_int8
from fewbits.tensor import QuantizedTensor

FORMATS = [
    "nf4:g64",
    "nf4:g64:dq",
    "nf4:g32:offset",
    "fp4:g64",
    "fp4:g32:f16",
    "dynamic8:g256",
    "udynamic8:g64",
    "int8:row",
    "int8:g32:f16:zero",
    "int4:g128",
    "int4:g32:f16:zero",
    "int4:g16:dq",
    "int3:g32:zero",
    "int2:row:bf16",
    "int2:b3x5",
    "fp8_e4m3:row",
    "fp8_e4m3:tensor",
    "fp8_e4m3:b128x128",
    "fp8_e5m2:g64",
    "mxfp4",
    "nvfp4",
]
FEW = ["nf4:g64:dq", "int4:g32:f16:zero", "int8:row", "nvfp4"]
every_format = pytest.mark.parametrize("spelling", FORMATS)
few_formats = pytest.mark.parametrize("spelling", FEW)


def parts_of(weight: QuantizedTensor) -> list[torch.Tensor]:
    return list(weight.parts().values())


# --- torch's own checks -----------------------------------------------------------------------------


@few_formats
def test_quantize_and_dequantize_meet_torchs_rules_for_ops(spelling):
    weight = quantize(torch.randn(5, 33), spelling)
    torch.library.opcheck(torch.ops.fewbits.quantize.default, (torch.randn(5, 33), spelling, "w"))
    torch.library.opcheck(
        torch.ops.fewbits.dequantize.default, (parts_of(weight), spelling, [5, 33], torch.bfloat16)
    )


@pytest.mark.parametrize("scheme", [*FEW, "int8:row@int8:t6"])
def test_linear_meets_torchs_rules_for_ops(scheme):
    spelling = scheme.partition("@")[0]
    parts = parts_of(quantize(torch.randn(11, 33), spelling))
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(11, requires_grad=True)
    torch.library.opcheck(torch.ops.fewbits.linear.default, (x, parts, bias, scheme, [11, 33]))
    torch.library.opcheck(
        torch.ops.fewbits.linear_backward.default, (torch.randn(2, 3, 11), parts, spelling, [11, 33])
    )


def test_a_product_with_a_rounded_weight_meets_torchs_rules_for_ops():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 33), (11, 33), (11,)))
    torch.library.opcheck(torch.ops.fewbits.rounded_linear.default, (x, weight, bias, "int8:row@int8:t6"))
    torch.library.opcheck(
        torch.ops.fewbits.rounded_linear_backward.default,
        (torch.randn(2, 3, 11), weight.detach(), "int8:row"),
    )


@few_formats
def test_embedding_meets_torchs_rules_for_ops(spelling):
    parts = parts_of(quantize(torch.randn(11, 33), spelling))
    torch.library.opcheck(
        torch.ops.fewbits.embedding.default,
        (torch.tensor([[3, 1], [0, 10]]), parts, spelling, [11, 33], torch.float16),
    )


@every_format
@pytest.mark.parametrize("shape", [(5, 33), (7,), (), (0, 4), (2, 3, 5)], ids=str)
def test_shapes_and_dtypes_on_the_meta_device_are_those_of_real_results(spelling, shape):
    real = quantize(torch.randn(shape), spelling)
    traced = quantize(torch.randn(shape, device="meta"), spelling)
    assert [(p.shape, p.dtype) for p in parts_of(real)] == [(p.shape, p.dtype) for p in parts_of(traced)]
    for dtype in (torch.float16, torch.float32):
        decoded = traced.dequantize(dtype)
        assert (decoded.shape, decoded.dtype, decoded.device.type) == (torch.Size(shape), dtype, "meta")


# --- gradients --------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,)], ids=str)
def test_output_and_gradients_are_those_of_the_dequantized_float_layer(spelling, lead):
    weight = quantize(torch.randn(11, 65), spelling)
    dense = weight.dequantize(torch.float64)
    x, bias = torch.randn(*lead, 65, requires_grad=True), torch.randn(11, requires_grad=True)
    grad = torch.randn(*lead, 11)
    y = linear(x, weight, bias)
    y.backward(grad)
    exact_x, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    exact = torch.nn.functional.linear(exact_x, dense, exact_bias)
    exact.backward(grad.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=1e-5, atol=1e-5)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_stay_within_its_rounding(spelling, dtype):
    weight = quantize(torch.randn(11, 65), spelling)
    dense = weight.dequantize(dtype).double()
    x = torch.randn(4, 65, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True)
    grad = torch.randn(4, 11, dtype=dtype)
    y = linear(x, weight, bias)
    y.backward(grad)
    assert (y.dtype, x.grad.dtype, bias.grad.dtype) == (dtype, dtype, dtype)
    eps = torch.finfo(dtype).eps
    pairs = [
        (y, x.double() @ dense.T + bias.double(), x.double().abs() @ dense.abs().T + bias.double().abs()),
        (x.grad, grad.double() @ dense, grad.double().abs() @ dense.abs()),
        (bias.grad, grad.double().sum(0), grad.double().abs().sum(0)),
    ]
    for mine, truth, size in pairs:
        # The result is rounded, and a kernel may take the weights before or after they are.
        assert ((mine.double() - truth).abs() <= eps * truth.abs() + 0.6 * eps * size).all()


def test_the_gradient_through_int8_activations_is_that_of_the_decoded_weight():
    weight = quantize(torch.randn(11, 65), "int8:row")
    x = (torch.randn(4, 65) * 4).requires_grad_()
    linear(x, weight, activation="int8:t6").sum().backward()
    truth = weight.dequantize(torch.float64).sum(0).expand(4, 65)
    torch.testing.assert_close(x.grad.double(), truth, rtol=1e-5, atol=1e-5)


@few_formats
@pytest.mark.parametrize(("needs_x", "needs_bias"), [(True, False), (False, True)])
def test_only_the_gradients_asked_for_are_computed(spelling, needs_x, needs_bias, monkeypatch):
    weight = quantize(torch.randn(11, 65), spelling)
    x, bias = torch.randn(4, 65, requires_grad=needs_x), torch.randn(11, requires_grad=needs_bias)
    decoded = spied(monkeypatch, "linear_backward")
    linear(x, weight, bias).sum().backward()
    assert len(decoded) == needs_x
    assert (x.grad is not None, bias.grad is not None) == (needs_x, needs_bias)


def test_a_strided_gradient_is_read_right():
    weight = quantize(torch.randn(6, 65), "nf4:g64")
    x = torch.randn(3, 4, 65, requires_grad=True)
    linear(x, weight).transpose(0, 1).mul(2.0).sum().backward()
    truth = 2 * weight.dequantize(torch.float64).sum(0).expand(3, 4, 65)
    torch.testing.assert_close(x.grad.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [*FEW, "int8:row@int8:t6"])
def test_nothing_but_the_stored_parts_is_kept_for_backward(scheme):
    spelling, _, activation = scheme.partition("@")
    weight = quantize(torch.randn(65, 65), spelling)
    x, bias = torch.randn(65, 65, requires_grad=True), torch.randn(65, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        linear(x, weight, bias, activation=activation or None).sum().backward()
    stored = {part.data_ptr() for part in weight.parts().values()}
    assert {tensor.data_ptr() for tensor in kept} == stored
    assert x.grad is not None


@pytest.mark.parametrize("backend", backends.BACKENDS, ids=lambda one: one.name)
@pytest.mark.parametrize("scheme", [*FEW, "int8:row@int8:t6", "nf4:g64@int8:g64"])
@pytest.mark.parametrize("lead", [(1,), (3,), (), (2, 3), (40, 40), (0,)], ids=str)
def test_what_a_layer_returns_may_be_changed_in_place(backend, scheme, lead, monkeypatch):
    """As that of nn.Linear may: models add to it, or clamp it. Autograd refuses where it is a view."""
    monkeypatch.setattr(
        backends, "BACKENDS", tuple({backend.name: backend, "last": backends.BACKENDS[-1]}.values())
    )
    spelling, _, activation = scheme.partition("@")
    x = torch.randn(*lead, 64, requires_grad=True)
    y = linear(x, quantize(torch.randn(11, 64), spelling), activation=activation or None)
    y.add_(1).mul_(2).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("scheme", [*FEW, "int8:row@int8:t6"])
@pytest.mark.filterwarnings("error")
def test_gradients_of_gradients_are_those_of_the_dequantized_layer(scheme):
    """For LLM.int8() with the product itself as it was rounded: that is where the gradient is taken."""
    spelling, _, activation = scheme.partition("@")
    weight, x = quantize(torch.randn(11, 65), spelling), torch.randn(2, 3, 65, requires_grad=True)
    dense, other = weight.dequantize(torch.float64), torch.randn(2, 3, 65)
    y = linear(x, weight, activation=activation or None)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * other).sum(), x, create_graph=True)
    truth = (other.double() @ dense.T * 6 * y.detach().double()) @ dense
    torch.testing.assert_close(second.double(), truth, rtol=1e-4, atol=1e-3)
    (third,) = torch.autograd.grad((second * other).sum(), x)
    truth = ((other.double() @ dense.T).square() * 6) @ dense
    torch.testing.assert_close(third.double(), truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", ["nf4:g64", "int8:row@int8:t6", "int8:row@int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_inside_the_ops(scheme, dtype):
    spelling, _, activation = scheme.partition("@")
    weight = quantize(torch.randn(33, 256), spelling)
    x = torch.randn(5, 256, dtype=dtype)
    x[:, 3] *= 20
    y = linear(x, weight, activation=activation or None)
    grad = torch.ops.fewbits.linear_backward(y, parts_of(weight), spelling, [33, 256])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, activation=activation or None), y)
        assert torch.equal(torch.ops.fewbits.linear_backward(y, parts_of(weight), spelling, [33, 256]), grad)


# --- torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4:g64:dq", "int4:g32:f16:zero", "int8:row@int8:t6", "mxfp4"])
def test_compiled_whole_with_a_dynamic_batch_it_gives_the_eager_result(scheme):
    torch._dynamo.reset()
    spelling, _, activation = scheme.partition("@")
    weight = quantize(torch.randn(11, 65), spelling)
    parts, shape = parts_of(weight), list(weight.shape)

    def layer(x, bias):
        return torch.ops.fewbits.linear(torch.tanh(x), parts, bias, scheme, shape) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    for batch in (3, 5, 8):
        x, bias = torch.randn(batch, 65, requires_grad=True), torch.randn(11, requires_grad=True)
        compiled(x, bias).square().sum().backward()
        eager_x, eager_bias = (t.detach().clone().requires_grad_() for t in (x, bias))
        y = linear(torch.tanh(eager_x), weight, eager_bias, activation=activation or None) * 2
        y.square().sum().backward()
        torch.testing.assert_close(compiled(x, bias), y)
        torch.testing.assert_close(x.grad, eager_x.grad)
        torch.testing.assert_close(bias.grad, eager_bias.grad)
    assert frames["ok"] == frames["total"] <= 2, "a new batch size does not compile again"


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(3, 64), r"torch\.float32 \[3, 64\]"),
        (torch.tensor(1.0), r"torch\.float32 \[\]"),
        (torch.ones(3, 65, dtype=torch.int64), r"torch\.int64 \[3, 65\]"),
    ],
    ids=["shape", "rank", "dtype"],
)
def test_linear_says_what_it_got_and_what_it_takes(x, got):
    weight = quantize(torch.randn(11, 65), "nf4:g64")
    with pytest.raises(ValueError, match=rf"cannot multiply x {got} with a weight \[11, 65\] in nf4:g64"):
        linear(x, weight)


def test_linear_needs_a_matrix():
    weight = quantize(torch.randn(65), "nf4:g64")
    with pytest.raises(ValueError, match=r"cannot multiply x .* with a weight \[65\] in nf4:g64"):
        linear(torch.randn(3, 65), weight)


def test_the_backward_op_says_what_gradient_it_got():
    parts = parts_of(quantize(torch.randn(11, 65), "nf4:g64"))
    with pytest.raises(ValueError, match=r"\[3, 65\] with a weight \[11, 65\] in nf4:g64"):
        torch.ops.fewbits.linear_backward(torch.randn(3, 65), parts, "nf4:g64", [11, 65])


def test_linear_names_both_devices_when_they_differ():
    weight = quantize(torch.randn(11, 65), "nf4:g64")
    with pytest.raises(ValueError, match="x is on cpu, but the weight is on meta; move one"):
        linear(torch.randn(3, 65), weight.to("meta"))
    with pytest.raises(ValueError, match="x is on meta, but the weight is on cpu; move one"):
        linear(torch.randn(3, 65, device="meta"), weight)


def test_int8_activations_with_other_weights_are_refused():
    weight = quantize(torch.randn(11, 64), "nf4:g64")
    with pytest.raises(ValueError, match="nf4:g64 cannot be multiplied with activations in int8:t6"):
        linear(torch.randn(3, 64), weight, activation="int8:t6")


@pytest.mark.parametrize("group", [0, 8, 64, 128])
@pytest.mark.parametrize("spelling", ["nf4:g64", "int4:g32:f16:zero", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_activations_differ_from_exact_ones_by_their_rounding(spelling, group, rows):
    weight, x, bias = quantize(torch.randn(37, 192), spelling), torch.randn(rows, 192), torch.randn(37)
    activation = f"int8:g{group}" if group else "int8"
    y = linear(x, weight, bias, activation=activation)
    rounded = linear(rounded_to_int8(x, group), weight, bias)
    assert not torch.equal(y, linear(x, weight, bias))
    assert float((y - rounded).norm() / rounded.norm()) < 0.01  # the codebook may be rounded to int8 as well


def test_activations_in_int8_are_multiples_of_a_hundred_and_twenty_seventh_of_the_largest():
    x = torch.tensor([[127.0, 1.4, -2.6, 0.0], [-12.7, 0.05, 0.04, 0.149]])
    wanted = torch.tensor([[127.0, 1.0, -3.0, 0.0], [-12.7, 0.0, 0.0, 0.1]])
    torch.testing.assert_close(rounded_to_int8(x, 0), wanted)
    torch.testing.assert_close(
        rounded_to_int8(x, 2)[:, 2:], torch.tensor([[-2.6, 0.0], [0.03989, 0.149]]), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["nf4:g64", "nf4:g64@int8:g64", "int8:row@int8", "int8:row@int8:t6"])
def test_an_input_that_is_not_finite_never_gives_finite_outputs(scheme, bad):
    format, _, activation = scheme.partition("@")
    x = torch.randn(2, 128)
    x[1, 5] = bad
    y = linear(x, quantize(torch.randn(16, 128), format), activation=activation or None)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_a_bias_of_wrong_length_is_refused():
    weight = quantize(torch.randn(11, 65), "nf4:g64")
    with pytest.raises((ValueError, RuntimeError)):
        linear(torch.randn(3, 65), weight, torch.randn(10))


@pytest.mark.parametrize("scheme", ["nf4:g64", "int8:row@int8"])
def test_a_bias_of_length_one_is_not_spread_over_all_outputs(scheme):
    spelling, _, activation = scheme.partition("@")
    weight = quantize(torch.randn(11, 65), spelling)
    with pytest.raises((ValueError, RuntimeError)):
        linear(torch.randn(3, 65), weight, torch.randn(1), activation=activation or None)


def test_quantize_names_the_tensor_and_the_format_it_does_not_know():
    with pytest.raises(ValueError, match=r"^layers\.1\.weight"):
        quantize(torch.full((4,), torch.nan), "nf4:g64", name="layers.1.weight")
    with pytest.raises(ValueError, match="unknown format 'nf5'"):
        quantize(torch.randn(4), "nf5")


# --- embedding --------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("columns", [33, 64, 1])
def test_embedding_returns_the_decoded_rows(spelling, columns):
    table = quantize(torch.randn(23, columns), spelling)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    for indices in (torch.tensor([[0, 22], [7, 7]]), torch.tensor(3), nothing):
        rows = embedding(indices, table, torch.bfloat16)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, dequantize(table, torch.bfloat16)[indices])
    assert embedding(torch.tensor([1], dtype=torch.int32), table).dtype == torch.float32


@few_formats
@pytest.mark.parametrize("wrong", [[-1], [23], [0, 5, 10**12], [[2, -(10**12)]]])
def test_embedding_refuses_indices_out_of_range(spelling, wrong):
    table = quantize(torch.randn(23, 33), spelling)
    with pytest.raises(IndexError, match="23 rows"):
        embedding(torch.tensor(wrong), table)


# --- what is asked of a backend ---------------------------------------------------------------------


def spied(monkeypatch, op: str) -> list[tuple]:
    """The arguments of every call of one kernel of the reference."""
    calls: list[tuple] = []
    original = getattr(backends.reference, op)

    def spy(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(backends.reference, op, spy)
    only_reference = tuple(b for b in backends.BACKENDS if b.name == "reference")
    monkeypatch.setattr(backends, "BACKENDS", only_reference)
    return calls


def test_the_detour_over_the_op_leaves_dtype_and_format_in_place():
    weight = torch.randn(4, 64, dtype=torch.float16, requires_grad=True)
    quantized = ops.quantize(weight, "nf4:g64")
    assert (str(quantized.format), quantized.shape) == ("nf4:g64", weight.shape)
    assert quantized.dtype == torch.float16
    assert not quantized.dequantize().requires_grad

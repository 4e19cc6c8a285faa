"""Gradients through quantized layers: those of the dequantized layer, for the memory of the codes alone."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbits.format import Scheme
from fewbits.model import quantize_model
from fewbits.nn import QuantLinear
from fewbits.recipe import Recipe, Rule

SCHEMES = [
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
    "int8:row@int8:t6",
    "int8:row@int8",
    "nf4:g64@int8:g64",
]
FEW = ["nf4:g64:dq", "int4:g32:f16:zero", "int8:row@int8:t6", "nvfp4"]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
few_schemes = pytest.mark.parametrize("scheme", FEW)
ROWS, COLUMNS = 37, 131  # a prime number of columns: groups straddle rows, or are cut short


def quantized(scheme: str, rows: int = ROWS, columns: int = COLUMNS) -> QuantLinear:
    model = nn.Sequential(nn.Linear(columns, rows))
    quantize_model(model, Recipe((Rule(".*", Scheme.parse(scheme), "test"),)))
    model[0].bias.requires_grad_()
    return model[0]


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y, gradient of x, gradient of the bias) for a gradient of y that is the same for every layer."""
    x = x.clone().requires_grad_()
    layer.bias.grad = None
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).cos().to(y.dtype))
    return y.detach(), x.grad, layer.bias.grad.clone()


@every_scheme
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_gradients_are_those_of_the_dequantized_layer(scheme, lead, autocast):
    """Within rounding: the dtype multiplied in has 24 bits, or 8 under autocast."""
    layer = quantized(scheme)
    plain = nn.Linear(COLUMNS, ROWS)
    plain.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias.detach()})
    x = torch.randn(*lead, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (y, *mine), (plain_y, *wanted) = run(layer, x), run(plain, x)
    assert y.dtype == plain_y.dtype
    tolerance = 2e-2 if autocast else 1e-5
    for one, other in zip(mine, wanted, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert one.shape == other.shape
        size = float(other.norm())
        assert float((one - other).norm()) <= tolerance * size


@every_scheme
def test_only_the_stored_parts_are_kept_for_backward_and_none_is_copied(scheme):
    layer = quantized(scheme, 64, 192)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = layer(torch.randn(80, 192, requires_grad=True))
    stored = [part for name, part in (*layer.named_parameters(), *layer.named_buffers()) if name != "bias"]
    places = {part.untyped_storage().data_ptr() for part in stored}
    assert {one.untyped_storage().data_ptr() for one in kept} == places
    assert sum(one.nbytes for one in kept) == sum(part.nbytes for part in stored)
    assert max(one.nbytes for one in kept) < layer.dequantize().nbytes
    y.sum().backward()


def ways(layer: nn.Module) -> Iterator[tuple[str, object, object]]:
    """(name, context, layer) of other ways through the same layer."""
    graph = torch.autograd.graph
    yield "offloaded", graph.save_on_cpu(), layer
    yield "copied", graph.saved_tensors_hooks(torch.clone, torch.clone), layer
    for reentrant in (False, True):
        recomputed = checkpointed(layer, reentrant)
        yield f"recomputed, reentrant={reentrant}", torch.enable_grad(), recomputed


def checkpointed(layer: nn.Module, reentrant: bool) -> nn.Module:
    outer = copy.copy(layer)
    outer.forward = lambda x: checkpoint(layer, x, use_reentrant=reentrant)
    return outer


@every_scheme
def test_offloading_and_recomputing_change_no_gradient(scheme):
    layer, x = quantized(scheme), torch.randn(2, 3, COLUMNS)
    wanted = run(layer, x)
    for name, context, other in ways(layer):
        with context:
            found = run(other, x)
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True)), name


@few_schemes
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiled_whole_the_layer_has_the_same_gradients(scheme, autocast):
    torch._dynamo.reset()
    layer, x = quantized(scheme), torch.randn(2, 3, COLUMNS)
    compiled = copy.copy(layer)
    compiled.forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for one, other in zip(run(compiled, x), run(layer, x), strict=True):
            torch.testing.assert_close(one, other)


@few_schemes
def test_a_frozen_bias_and_a_frozen_input_get_no_gradient(scheme):
    layer, x = quantized(scheme), torch.randn(3, COLUMNS)
    layer(x).sum().backward()
    assert layer.bias.grad is not None
    assert x.grad is None
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    assert all(part.grad is None for name, part in layer.named_parameters() if name != "bias")

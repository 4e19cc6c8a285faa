"""Which backend computes an op, and why not another."""

import pytest
import torch

from fewbits import backends, moments, reference
from fewbits.backends import BACKENDS, OPS, Backend, choose, choose_update, cpu, explain
from fewbits.format import Format
from fewbits.ops import linear, quantize


class Fake:
    """Kernels that count; the results are the reference's."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, op):
        def kernel(*args):
            self.calls.append(op)
            return getattr(reference, op)(*args)

        return kernel


def refuse(op: str, format: Format, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"has no kernels for {device.type}"
    if format.family != "nf4":
        return f"does not know {format.family}"
    return "cannot quantize" if op == "quantize" else None


@pytest.fixture
def fake(monkeypatch):
    kernels = Fake()
    listed = (Backend("fake", kernels, refuse), Backend("reference", reference, lambda *case: None))
    monkeypatch.setattr(backends, "BACKENDS", listed)
    return kernels


def test_the_reference_is_last_and_supports_everything():
    assert BACKENDS[-1].name == "reference"
    assert BACKENDS[-1].kernels is reference
    for spelling in ("nf4:g64:dq", "int3:b2x5:zero", "nvfp4", "fp8_e5m2:tensor", "udynamic8"):
        for device in ("cpu", "cuda", "meta"):
            for op in OPS:
                assert BACKENDS[-1].refuse(op, Format.parse(spelling), torch.device(device)) is None


def test_every_op_is_a_function_of_the_reference():
    assert all(callable(getattr(reference, op)) for op in OPS)
    products = {"linear", "linear_backward", "linear_int8", "linear_a8"}
    assert set(OPS) == {"quantize", "dequantize", "embedding"} | products


def test_the_first_backend_that_does_not_refuse_is_chosen(fake):
    cpu, nf4, int8 = torch.device("cpu"), Format.parse("nf4:g64"), Format.parse("int8:row")
    assert choose("linear", nf4, cpu) is fake
    assert choose("quantize", nf4, cpu) is reference
    assert choose("linear", int8, cpu) is reference
    assert choose("linear", nf4, torch.device("cuda")) is reference


def test_ops_run_on_the_backend_that_is_chosen(fake):
    weight = quantize(torch.randn(4, 64), "nf4:g64")
    assert fake.calls == []
    linear(torch.randn(2, 64, requires_grad=True), weight).sum().backward()
    weight.dequantize()
    assert fake.calls == ["linear", "linear_backward", "dequantize"]
    linear(torch.randn(2, 64), quantize(torch.randn(4, 64), "int8:row"))
    assert fake.calls == ["linear", "linear_backward", "dequantize"]


def test_explain_gives_every_backend_in_order_with_its_reason(fake):
    answer = explain("nf4:g64")
    assert tuple(answer) == OPS
    assert answer["linear"] == {"fake": "used", "reference": "not reached"}
    assert answer["quantize"] == {"fake": "cannot quantize", "reference": "used"}
    assert list(answer["quantize"]) == ["fake", "reference"]
    assert explain(Format.parse("int8:row"))["linear"] == {"fake": "does not know int8", "reference": "used"}
    assert explain("nf4", "cuda:0")["linear"] == {"fake": "has no kernels for cuda", "reference": "used"}


def test_explain_agrees_with_choose(fake):
    for spelling in ("nf4:g64", "int8:row"):
        for device in ("cpu", "meta"):
            for op, row in explain(spelling, device).items():
                (used,) = [name for name, why in row.items() if why == "used"]
                chosen = choose(op, Format.parse(spelling), torch.device(device))
                assert chosen is {"fake": fake, "reference": reference}[used]


def test_explain_refuses_what_is_no_format():
    with pytest.raises(ValueError, match="unknown format 'nf5'"):
        explain("nf5")


def test_steps_of_optimizers_are_taken_by_the_library_on_cpus_and_by_the_specification_elsewhere():
    assert choose_update(torch.device("cpu")) is (moments.update if cpu.unavailable() else cpu.update)
    assert choose_update(torch.device("cuda")) is moments.update

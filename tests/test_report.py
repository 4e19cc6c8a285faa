"""The report: every weight once, with what it is stored as or why it was kept, and what it takes."""

import json

import pytest
import torch
from torch import nn

from fewbits.format import Scheme
from fewbits.model import quantize_model
from fewbits.recipe import Recipe, Rule
from fewbits.report import Entry, Report, report


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Zoo(nn.Module):
    """One of everything that holds weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64, bias=False)])
        self.odd = Scaled(64, 64)
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.table = nn.Parameter(torch.randn(4, 5))
        self.cube = nn.Parameter(torch.randn(2, 3, 4))


def bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


FORMATS = ["nf4:g64", "nf4:g64:dq", "int8:row", "int4:g32:f16:zero", "int8:row@int8:t6", "nvfp4:g16"]


@pytest.mark.parametrize("scheme", FORMATS)
def test_every_parameter_of_a_model_appears_exactly_once(scheme):
    model = Zoo()
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    result = quantize_model(model, scheme)
    assert sorted(entry.name for entry in result.entries) == sorted(names)
    assert {entry.name: entry.shape for entry in result.entries} == shapes
    assert {entry.name for entry in result.quantized} == {"layers.0.weight", "layers.1.weight"}
    assert {entry.stored for entry in result.quantized} == {scheme}


def test_every_kept_weight_has_a_reason_and_no_quantized_one_has():
    result = quantize_model(Zoo(), "nf4:g64")
    assert len(result.kept) + len(result.quantized) == len(result.entries)
    assert all(entry.reason.strip() for entry in result.kept)
    assert all(entry.reason == "" for entry in result.quantized)
    reasons = {entry.name: entry.reason for entry in result.kept}
    assert "subclass" in reasons["odd.weight"]
    assert "Scaled" in reasons["odd.weight"]
    assert "embedding" in reasons["embed.weight"]
    assert "1-dimensional" in reasons["norm.weight"]
    assert "1-dimensional" in reasons["layers.0.bias"]
    assert "0-dimensional" in reasons["scale"]
    assert "Conv1d" in reasons["conv.weight"]
    assert "Zoo" in reasons["table"]


@pytest.mark.parametrize("scheme", FORMATS)
def test_the_bytes_are_those_of_all_parameters_and_buffers(scheme):
    model = Zoo()
    assert report(model).nbytes == bytes_of(model)
    result = quantize_model(model, scheme)
    assert result.nbytes == bytes_of(model) < bytes_of(Zoo())
    assert report(model).nbytes == result.nbytes
    count = sum(parameter.numel() for parameter in Zoo().parameters())
    assert sum(entry.count for entry in result.entries) == count
    assert result.bits_per_weight == 8 * bytes_of(model) / count


@pytest.mark.parametrize("scheme", FORMATS)
def test_the_relative_error_is_that_of_the_decoded_weight(scheme):
    model = Zoo()
    before = model.layers[0].weight.detach().double().clone()
    result = quantize_model(model, scheme)
    decoded = model.layers[0].dequantize().double()
    (entry,) = [entry for entry in result.entries if entry.name == "layers.0.weight"]
    assert entry.relative_error == pytest.approx(float((before - decoded).norm() / before.norm()), rel=1e-4)
    assert all(entry.relative_error is None for entry in result.kept)


def test_a_weight_of_zeros_has_no_error():
    model = nn.Sequential(nn.Linear(64, 8))
    nn.init.zeros_(model[0].weight)
    assert quantize_model(model, "nf4:g64").quantized[0].relative_error == 0.0


def test_a_plain_model_is_all_kept():
    result = report(Zoo())
    assert result.quantized == ()
    assert len(result.entries) == len(list(Zoo().parameters()))
    assert result.bits_per_weight == 32.0


def test_the_report_of_a_model_can_be_asked_for_again():
    model = Zoo()
    assert report(model) != quantize_model(model, "nf4:g64")
    assert report(model) == report(model)
    assert str(report(model)) == str(report(model))


def test_tied_weights_appear_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    for scheme in (None, Scheme.parse("nf4:g64")):
        result = quantize_model(model, Recipe((Rule("0", scheme, "named"),)))
        assert [entry.name for entry in result.entries] == ["0.weight"]
        assert result.entries[0].quantized == (scheme is not None)
        assert result.nbytes == bytes_of(model)


def test_text_and_json_name_every_weight():
    result = quantize_model(Zoo(), "nf4:g64:dq")
    text, values = str(result), json.loads(json.dumps(result.to_json()))
    lines = text.splitlines()
    assert len(lines) == 2 + len(result.entries)
    for entry, line in zip(result.entries, lines[1:-1], strict=True):
        assert line.startswith(entry.name)
        assert entry.stored in line
        assert f"{entry.nbytes:,}" in line
        assert entry.reason in line
    assert [weight["name"] for weight in values["weights"]] == [entry.name for entry in result.entries]
    assert values["bytes"] == result.nbytes
    assert values["bits_per_weight"] == result.bits_per_weight
    assert lines[-1] == result.summary


def test_the_summary_counts_formats_and_names_what_stayed_large():
    entries = (
        Entry("a.weight", (64, 64), "nf4:g64", 2304, True),
        Entry("b.weight", (64, 64), "nf4:g64", 2304, True),
        Entry("c.weight", (64, 64), "int8:row", 4352, True),
        Entry("d.weight", (10, 64), "float32", 2560, False, "an embedding"),
        Entry("d.bias", (10,), "float32", 40, False, "1-dimensional"),
    )
    result = Report(entries)
    assert result.nbytes == 11560
    assert result.bits_per_weight == pytest.approx(8 * 11560 / (3 * 4096 + 650))
    for piece in ("2 x nf4:g64", "1 x int8:row", "kept: 2 of 5", "d.weight", "0.01 MB", "7.15 bits"):
        assert piece in result.summary
    assert "d.bias" not in result.summary


def test_an_empty_model_has_an_empty_report():
    result = report(nn.Sequential())
    assert (result.entries, result.nbytes, result.bits_per_weight) == ((), 0, 0.0)
    assert "none" in str(result)

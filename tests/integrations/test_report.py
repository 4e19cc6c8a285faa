"""Nothing is silent: the report lists every weight once, and loading logs its summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Layers = Callable[[nn.Module], dict[str, QuantModule]]

KINDS = ["llama", "llama_tied", "llama_bias", "gpt2", "opt", "mixtral", "qwen2_moe", "gpt_oss", "bert", "t5"]
CONFIGS: dict[str, Any] = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"]),
    "head": fewbits.FewbitsConfig("int4:g16:zero", modules={"lm_head": "int8:row"}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reloaded", [False, True], ids=["fresh", "reloaded"])
def test_every_weight_is_there_once_with_its_bytes_and_reason(
    kind: str,
    config: Any,
    reloaded: bool,
    checkpoint: Checkpoint,
    load: Load,
    quantized: Layers,
    tmp_path: Path,
) -> None:
    path = checkpoint(kind, torch.bfloat16)
    plain, model = load(path), load(path, config)
    if reloaded:
        model.save_pretrained(tmp_path)
        model = load(tmp_path)
    report = fewbits.report(model)
    names = [entry.name for entry in report.entries]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in plain.named_parameters()}
    for entry in report.entries:
        assert entry.shape in (tuple(plain.get_parameter(entry.name).shape), entry_shape(plain, entry))
        assert bool(entry.reason) != entry.quantized, entry
    layers = quantized(model)
    weights = {f"{name}.{weight}" for name, layer in layers.items() for weight in layer.weights()}
    tied = set(plain.all_tied_weights_keys)
    assert {entry.name for entry in report.quantized} == weights - tied
    assert report.nbytes == model.get_memory_footprint(return_buffers=False) + scale_buffers(model)
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert sum(entry.count for entry in report.entries) == count
    assert report.bits_per_weight == pytest.approx(8 * report.nbytes / count)
    known = [entry.relative_error for entry in report.quantized if entry.relative_error is not None]
    assert len(known) == (0 if reloaded else len(report.quantized))
    assert all(0 < error < 0.15 for error in known)


def entry_shape(plain: nn.Module, entry: fewbits.report.Entry) -> tuple[int, ...]:  # type: ignore[name-defined]
    """Transposed weights are listed as they are stored: [out, in]."""
    shape = tuple(plain.get_parameter(entry.name).shape)
    return (*shape[:-2], *shape[:-3:-1])


def scale_buffers(model: nn.Module) -> int:
    """Bytes of scales held as buffers; those of tied layers once."""
    found: dict[int, Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, QuantModule):
            found |= {buffer.data_ptr(): buffer for buffer in layer.buffers(recurse=False)}
    return sum(buffer.nbytes for buffer in found.values())


class TestReasons:
    def kept(self, model: nn.Module) -> dict[str, str]:
        return {entry.name: entry.reason for entry in fewbits.report(model).kept}

    def test_of_untied_llama(self, checkpoint: Checkpoint, load: Load) -> None:
        kept = self.kept(load(checkpoint("llama"), CONFIGS["int8"]))
        assert kept["lm_head.weight"] in ("the output embedding", "the last layer")
        assert "embedding" in kept["model.embed_tokens.weight"]
        assert "FewbitsConfig" in kept["model.embed_tokens.weight"]
        assert kept["model.norm.weight"] == "1-dimensional"
        assert kept["model.layers.0.self_attn.q_proj.weight"] == "llm_int8_skip_modules"

    def test_of_tied_llama(self, checkpoint: Checkpoint, load: Load) -> None:
        kept = self.kept(load(checkpoint("llama_tied"), CONFIGS["nf4"]))
        assert "lm_head" in kept["model.embed_tokens.weight"]
        assert "tied" in kept["model.embed_tokens.weight"]

    def test_of_a_recipe(self, checkpoint: Checkpoint, load: Load) -> None:
        config = fewbits.FewbitsConfig("skip", modules={"q_proj": "skip", "mlp": "nf4:g64"})
        kept = self.kept(load(checkpoint("llama"), config))
        assert kept["model.layers.0.self_attn.q_proj.weight"] == 'modules["q_proj"]'
        assert kept["model.layers.0.self_attn.k_proj.weight"] == "format"

    def test_of_a_plain_model(self, checkpoint: Checkpoint, load: Load) -> None:
        report = fewbits.report(load(checkpoint("llama", torch.bfloat16)))
        assert not report.quantized
        assert report.bits_per_weight == 16
        assert all(entry.reason for entry in report.entries)


def test_loading_logs_one_summary(
    checkpoint: Checkpoint, load: Load, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="fewbits"):
        model = load(path, CONFIGS["nf4"])
        model.save_pretrained(tmp_path)
        load(tmp_path)
    told = [record for record in caplog.records if record.name == "fewbits"]
    assert [record.levelname for record in told] == ["INFO", "INFO"]
    report = fewbits.report(model)
    for record in told:
        assert record.getMessage() == report.summary
    assert "14 x nf4:g64:dq" in report.summary
    assert "lm_head.weight" in report.summary
    assert f"{report.bits_per_weight:.2f} bits per weight" in report.summary


def test_print_and_json_say_the_same(checkpoint: Checkpoint, load: Load) -> None:
    model = load(checkpoint("gpt2"), CONFIGS["nf4"])
    report = fewbits.report(model)
    text = str(report)
    assert text.endswith(report.summary)
    stored = json.loads(json.dumps(report.to_json()))
    assert stored["bytes"] == report.nbytes
    assert [row["name"] for row in stored["weights"]] == [entry.name for entry in report.entries]
    for entry in report.entries:
        line = next(line for line in text.splitlines() if line.split()[0] == entry.name)
        assert entry.stored in line
        assert f"{entry.nbytes:,}" in line
        assert entry.quantized or line.endswith(entry.reason)


def test_quantize_model_returns_the_report_of_the_model(new_model: Callable[..., Any]) -> None:
    model = new_model("llama")
    report = fewbits.quantize_model(model, "int8:row")
    assert report == fewbits.report(model)
    assert str(report) == str(fewbits.report(model))

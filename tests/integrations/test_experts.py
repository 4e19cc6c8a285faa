"""Mixtures: their fused experts are quantized, too, each expert on its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.experts import QuantExperts
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]
Tensors = Callable[[Path], dict[str, Tensor]]

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
CONFIGS: dict[str, tuple[str, Any]] = {
    "nf4_dq": ("nf4:g64:dq", NF4),
    "nf4_dq_in_bf16": (
        "nf4:g64:dq",
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage="bfloat16",
        ),
    ),
    "int8": ("int8:row", BitsAndBytesConfig(load_in_8bit=True)),
    "int4": ("int4:g16:zero", fewbits.FewbitsConfig("int4:g16:zero")),
    "mxfp4": ("mxfp4:g32", fewbits.FewbitsConfig("mxfp4")),
}
pytestmark = pytest.mark.parametrize("kind", KINDS)


def experts_of(model: nn.Module) -> dict[str, QuantExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


@pytest.mark.parametrize(("format", "config"), CONFIGS.values(), ids=CONFIGS)
class TestEveryFormat:
    def test_each_expert_is_its_float_weight_quantized(
        self, kind: str, format: str, config: Any, checkpoint: Checkpoint, load: Load
    ) -> None:
        path = checkpoint(kind, torch.bfloat16)
        plain, model = load(path), load(path, config)
        assert len(experts_of(model)) == 2
        for name, experts in experts_of(model).items():
            for weight in ("gate_up_proj", "down_proj"):
                value = plain.get_parameter(f"{name}.{weight}")
                for index, matrix in enumerate(value.transpose(1, 2) if kind == "gpt_oss" else value):
                    assert experts.quantized_weight(weight, index) == fewbits.quantize(matrix, format)

    def test_results_survive_files_bit_by_bit(
        self,
        kind: str,
        format: str,
        config: Any,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        same_tensors: Same,
        tmp_path: Path,
    ) -> None:
        model = load(checkpoint(kind, torch.bfloat16), config)
        result = run(model)
        model.save_pretrained(tmp_path / "saved")
        stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == "fewbits"
        again = load(tmp_path / "saved")
        assert len(experts_of(again)) == 2
        assert run(again).equal(result)
        assert again.get_memory_footprint() == model.get_memory_footprint()
        again.save_pretrained(tmp_path / "saved_again", max_shard_size="30KB")
        same_tensors(tmp_path / "saved", tmp_path / "saved_again")
        assert run(load(tmp_path / "saved_again")).equal(result)

    def test_dequantized_it_computes_the_same(
        self,
        kind: str,
        format: str,
        config: Any,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        tmp_path: Path,
    ) -> None:
        path = checkpoint(kind)
        plain, model = load(path), load(path, config)
        result, full = run(model), run(plain)
        model.dequantize()
        for name, module in plain.named_modules():
            assert type(model.get_submodule(name)) is type(module)
        shapes = {name: (value.shape, value.dtype) for name, value in plain.named_parameters()}
        assert {name: (value.shape, value.dtype) for name, value in model.named_parameters()} == shapes
        if "int8" not in format:  # whose linear layers multiply by rounded inputs
            torch.testing.assert_close(run(model), result, rtol=1e-3, atol=1e-3)
        assert 1e-4 < (run(model) - full).norm() / full.norm() < 0.75
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert not getattr(again, "is_quantized", False)
        assert run(again).equal(run(model))


def test_one_block_is_within_the_quantization_error(kind: str, checkpoint: Checkpoint, load: Load) -> None:
    """The experts alone, for the same routing: not blurred by what routing makes of small changes."""
    path = checkpoint(kind)
    plain, model = load(path), load(path, NF4)
    hidden = torch.randn(10, 64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    weights = torch.rand(10, 2)
    for name, experts in experts_of(model).items():
        with torch.no_grad():
            wanted = plain.get_submodule(name)(hidden, index, weights)
            got = experts(hidden, index, weights)
            decoded = {weight: experts.dequantize(weight) for weight in experts.weights()}
            for weight, value in decoded.items():
                plain.get_parameter(f"{name}.{weight}").copy_(value)
            exact = plain.get_submodule(name)(hidden, index, weights)
        assert 0.02 < (got - wanted).norm() / wanted.norm() < 0.25
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_an_expert_that_no_token_goes_to_changes_nothing(
    kind: str, checkpoint: Checkpoint, load: Load
) -> None:
    experts = next(iter(experts_of(load(checkpoint(kind), NF4)).values()))
    hidden, weights = torch.randn(3, 64), torch.rand(3, 1)
    with torch.no_grad():
        alone = experts(hidden[1:2], torch.tensor([[2]]), weights[1:2])
        together = experts(hidden, torch.tensor([[0], [2], [0]]), weights)
        nobody = experts(hidden[:0], torch.empty(0, 1, dtype=torch.long), weights[:0])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    assert nobody.shape == (0, 64)


def test_the_footprint_shrinks_by_the_experts(kind: str, checkpoint: Checkpoint, load: Load) -> None:
    path = checkpoint(kind, torch.bfloat16)
    plain, model = load(path), load(path, NF4)
    assert model.get_memory_footprint() < 0.4 * plain.get_memory_footprint()
    stored = 0
    for name, experts in experts_of(model).items():
        for weight in ("gate_up_proj", "down_proj"):
            assert not hasattr(experts, weight)
            count = plain.get_parameter(f"{name}.{weight}")[0].numel()
            groups = -(-count // 64)
            stored += 4 * (count // 2 + groups + 4 * -(-groups // 256) + 4)
    got = [e for e in fewbits.report(model).entries if ".experts." in e.name and e.quantized]
    assert sum(entry.nbytes for entry in got) == stored
    assert {entry.shape[0] for entry in got} == {4}


def test_routers_are_kept_with_a_reason(kind: str, checkpoint: Checkpoint, load: Load) -> None:
    path = checkpoint(kind)
    plain, model = load(path), load(path, NF4)
    name = "model.layers.0.mlp." + ("router" if kind == "gpt_oss" else "gate") + ".weight"
    assert model.get_parameter(name).equal(plain.get_parameter(name))
    entry = next(entry for entry in fewbits.report(model).kept if entry.name == name)
    assert entry.reason


def test_the_change_of_method_is_said_at_load(
    kind: str, checkpoint: Checkpoint, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fewbits"):
        model = load(checkpoint(kind), NF4)
    told = [record.getMessage() for record in caplog.records if record.name == "fewbits"]
    assert any("fused experts" in text and "import fewbits" in text for text in told)
    assert model.config.quantization_config.to_dict()["quant_method"] == "fewbits"
    assert model.quantization_method == "fewbits"


def test_experts_can_be_skipped(
    kind: str, checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    """What is left fits a bitsandbytes file again."""
    path = checkpoint(kind, torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["experts"])
    plain, model = load(path), load(path, config)
    assert not experts_of(model)
    assert len(quantized(model)) >= 8
    name = "model.layers.1.mlp.experts.down_proj"
    assert model.get_parameter(name).equal(plain.get_parameter(name))
    entry = next(entry for entry in fewbits.report(model).kept if entry.name == name)
    assert entry.reason == "llm_int8_skip_modules"
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    assert run(load(tmp_path)).equal(run(model))


def test_experts_alone_can_be_quantized(
    kind: str, checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    config = fewbits.FewbitsConfig("skip", modules={"experts": "nf4:g64:dq"})
    model = load(checkpoint(kind), config)
    assert quantized(model).keys() == experts_of(model).keys()
    assert len(experts_of(model)) == 2
    model.save_pretrained(tmp_path)
    assert run(load(tmp_path)).equal(run(model))


def test_a_reload_without_the_codes_of_experts_is_no_silent_random_model(
    kind: str, checkpoint: Checkpoint, load: Load, tensors_of: Tensors, tmp_path: Path
) -> None:
    load(checkpoint(kind), NF4).save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    kept = {name: stored[name] for name in stored if ".0." in name or "expert" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="experts"):
        load(tmp_path)


def test_loaded_models_quantize_in_place(
    kind: str, new_model: Callable[..., Any], checkpoint: Checkpoint, load: Load, run: Run
) -> None:
    model = load(checkpoint(kind))
    report = fewbits.quantize_model(model, fewbits.BitsAndBytesConfig(load_in_4bit=True))
    loaded = load(checkpoint(kind), BitsAndBytesConfig(load_in_4bit=True))
    assert run(model).equal(run(loaded))
    assert {e.name: (e.stored, e.nbytes) for e in report.entries} == {
        e.name: (e.stored, e.nbytes) for e in fewbits.report(loaded).entries
    }


def test_gradients_pass_through_experts(kind: str, checkpoint: Checkpoint, load: Load) -> None:
    path = checkpoint(kind)
    name, experts = next(iter(experts_of(load(path, NF4)).items()))
    twin = load(path, NF4).dequantize().get_submodule(name)
    hidden = torch.randn(5, 64)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]])
    weights = torch.rand(5, 2)
    grads = []
    for module in (experts, twin):
        x = hidden.clone().requires_grad_()
        module(x, index, weights).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-2)
    weights = {name: value for name, value in experts.named_parameters() if not name.endswith("bias")}
    assert weights
    assert not any(parameter.requires_grad for parameter in weights.values())

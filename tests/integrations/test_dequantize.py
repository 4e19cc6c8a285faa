"""`model.dequantize()` leaves a plain model, and nothing that tells of quantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]
Tensors = Callable[[Path], dict[str, Tensor]]

CONFIGS: dict[str, Any] = {
    "nf4_dq": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4_in_bf16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "own": fewbits.FewbitsConfig("int4:g16:zero", modules={"embed_tokens": "int8:row", "lm_head": "nf4:g64"}),
}
TRACES = (
    "hf_quantizer",
    "quantization_config",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)

by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
from_files = pytest.mark.parametrize("reloaded", [False, True], ids=["fresh", "reloaded"])


@pytest.fixture
def loaded(checkpoint: Checkpoint, load: Load, tmp_path: Path) -> Callable[..., Any]:
    """loaded(config, reloaded): a quantized bf16 Llama, straight or by way of its own files."""

    def build(config: Any, reloaded: bool = False, kind: str = "llama") -> Any:
        model = load(checkpoint(kind, torch.bfloat16), config)
        if reloaded:
            model.save_pretrained(tmp_path / "source")
            model = load(tmp_path / "source")
        return model

    return build


@by_config
@from_files
class TestDequantize:
    def test_layers_are_plain_and_hold_the_decoded_weights(
        self, config: Any, reloaded: bool, loaded: Callable[..., Any], checkpoint: Checkpoint, load: Load
    ) -> None:
        model = loaded(config, reloaded)
        decoded = {
            f"{name}.weight": layer.dequantize()
            for name, layer in model.named_modules()
            if isinstance(layer, QuantModule)
        }
        assert len(decoded) >= 14
        result = model.dequantize()
        assert result is model
        plain = load(checkpoint("llama", torch.bfloat16))
        for name, module in plain.named_modules():
            assert type(model.get_submodule(name)) is type(module), name
        assert set(dict(model.named_parameters())) == set(dict(plain.named_parameters()))
        for name, parameter in model.named_parameters():
            wanted = decoded[name].to(torch.bfloat16) if name in decoded else plain.get_parameter(name)
            assert parameter.equal(wanted), name
            assert parameter.dtype == torch.bfloat16, name
            assert parameter.requires_grad == plain.get_parameter(name).requires_grad, name

    def test_it_computes_what_the_quantized_model_computes(
        self, config: Any, reloaded: bool, loaded: Callable[..., Any], run: Run
    ) -> None:
        model = loaded(config, reloaded)
        result = run(model).float()
        model.dequantize()
        error = (run(model).float() - result).norm() / result.norm()
        assert error < (0.15 if config is CONFIGS["int8"] else 0.04)

    def test_no_trace_is_left(
        self, config: Any, reloaded: bool, loaded: Callable[..., Any], checkpoint: Checkpoint, load: Load
    ) -> None:
        model = loaded(config, reloaded).dequantize()
        plain = load(checkpoint("llama", torch.bfloat16))
        for name in TRACES:
            assert not hasattr(model, name), name
        assert not getattr(model, "is_quantized", False)
        for module in model.modules():
            assert not any("fewbits" in name for name in vars(module))
            config_ = getattr(module, "config", None)
            assert not getattr(config_, "_is_quantized", False)
            assert not hasattr(config_, "quantization_config")
        assert vars(model).keys() - vars(plain).keys() <= {"is_quantized"}
        assert not any(entry.quantized for entry in fewbits.report(model).entries)

    def test_it_saves_as_a_plain_checkpoint(
        self,
        config: Any,
        reloaded: bool,
        loaded: Callable[..., Any],
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        tensors_of: Tensors,
        tmp_path: Path,
    ) -> None:
        model = loaded(config, reloaded).dequantize()
        model.save_pretrained(tmp_path / "plain")
        source = tensors_of(checkpoint("llama", torch.bfloat16))
        stored = tensors_of(tmp_path / "plain")
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in source.items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == shapes
        settings = json.loads((tmp_path / "plain" / "config.json").read_text())
        assert "quantization_config" not in settings
        fewbits.enable(takeover=False)
        again = load(tmp_path / "plain")
        assert not getattr(again, "is_quantized", False)
        assert run(again).equal(run(model))

    def test_it_moves_casts_and_quantizes_again_like_any_model(
        self, config: Any, reloaded: bool, loaded: Callable[..., Any], run: Run, quantized: Layers
    ) -> None:
        model = loaded(config, reloaded).dequantize()
        model.float()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        model.half().to(torch.bfloat16)
        before = run(model)
        report = fewbits.quantize_model(model, "int3:g16:zero")
        assert len(report.quantized) == len(quantized(model)) == 14
        error = (run(model).float() - before.float()).norm() / before.float().norm()
        assert 0.01 < error < 0.7

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "float32"], ids=str)
    def test_the_dtype_can_be_chosen(
        self, dtype: Any, config: Any, reloaded: bool, loaded: Callable[..., Any], run: Run
    ) -> None:
        model = loaded(config, reloaded)
        layer = model.model.layers[0].mlp.up_proj
        wanted = layer.quantized_weight()
        model.dequantize(dtype=dtype)
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.dtype == chosen
        torch.testing.assert_close(weight.float(), wanted.dequantize(torch.float32), rtol=0.01, atol=1e-3)


@by_config
def test_gradients_reach_dequantized_weights(config: Any, loaded: Callable[..., Any]) -> None:
    model = loaded(config).dequantize()
    loss = model(input_ids=torch.tensor([[3, 14, 15, 92]]), labels=torch.tensor([[3, 14, 15, 92]])).loss
    loss.backward()
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0, name


@by_config
def test_a_second_time_is_an_error_as_for_any_plain_model(config: Any, loaded: Callable[..., Any]) -> None:
    model = loaded(config).dequantize()
    with pytest.raises(ValueError, match="first quantize your model"):
        model.dequantize()


def test_models_quantized_in_place_dequantize(
    checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers
) -> None:
    from fewbits.model import dequantize_model

    model = load(checkpoint("llama_tied"))
    fewbits.quantize_model(model, fewbits.FewbitsConfig(modules={"lm_head": "int8:row"}))
    result = run(model)
    assert len(quantized(model)) == 16
    dequantize_model(model)
    assert not quantized(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("fewbits" in name for name in vars(model))
    torch.testing.assert_close(run(model), result, rtol=1e-3, atol=1e-3)


def test_a_head_that_was_new_survives(checkpoint: Checkpoint, run: Run) -> None:
    cls = transformers.BertForSequenceClassification
    model = cls.from_pretrained(checkpoint("bert"), quantization_config=CONFIGS["nf4_dq"]).eval()
    result, head = run(model), model.classifier.weight.clone()
    model.dequantize()
    assert model.classifier.weight.equal(head)
    torch.testing.assert_close(run(model), result, rtol=1e-3, atol=1e-3)

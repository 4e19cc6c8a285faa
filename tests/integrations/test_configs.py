"""Which configs `from_pretrained` takes, and what a loaded model carries and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fewbits
from fewbits.nn import QuantLinear, QuantModule

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4_dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 5.0},
}
Layers = Callable[[nn.Module], dict[str, QuantModule]]


def weights(model: nn.Module, quantized: Layers) -> dict[str, fewbits.QuantizedTensor]:
    return {name: layer.quantized_weight() for name, layer in quantized(model).items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
class TestBitsAndBytesConfig:
    def test_every_spelling_gives_the_same_model(
        self,
        options: dict[str, Any],
        checkpoint: Callable[..., Path],
        load: Callable[..., Any],
        run: Callable[..., Any],
        quantized: Layers,
    ) -> None:
        path = checkpoint("llama", torch.bfloat16)
        spellings = (
            transformers.BitsAndBytesConfig(**options),
            fewbits.BitsAndBytesConfig(**options),
            dict(options),
            fewbits.BitsAndBytesConfig(**options).to_dict(),
            transformers.BitsAndBytesConfig(**options).to_dict(),
        )
        models = [load(path, config) for config in spellings]
        first = weights(models[0], quantized)
        assert len(first) == 14
        for model in models[1:]:
            assert weights(model, quantized) == first
            assert run(model).equal(run(models[0]))
            assert model.config.to_dict() == models[0].config.to_dict()

    @pytest.mark.parametrize("cls", [transformers.BitsAndBytesConfig, fewbits.BitsAndBytesConfig])
    def test_the_model_carries_transformers_config(
        self, options: dict[str, Any], cls: Any, checkpoint: Callable[..., Path], load: Callable[..., Any]
    ) -> None:
        model = load(checkpoint("llama"), cls(**options))
        wanted = transformers.BitsAndBytesConfig(**options)
        for carried in (model.config.quantization_config, model.hf_quantizer.quantization_config):
            assert type(carried) is transformers.BitsAndBytesConfig
            assert carried.to_dict() == wanted.to_dict()
        assert model.is_quantized
        assert model.quantization_method == "bitsandbytes"
        assert model.hf_quantizer.is_trainable

    def test_the_saved_config_reads_back_as_transformers_config(
        self,
        options: dict[str, Any],
        checkpoint: Callable[..., Path],
        load: Callable[..., Any],
        tmp_path: Path,
    ) -> None:
        load(checkpoint("llama"), fewbits.BitsAndBytesConfig(**options)).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        wanted = transformers.BitsAndBytesConfig(**options).to_dict()
        assert stored == json.loads(json.dumps(wanted, default=lambda value: value.value))
        assert transformers.BitsAndBytesConfig.from_dict(stored).to_dict() == wanted


def test_a_config_is_not_changed_by_loading(
    checkpoint: Callable[..., Path], load: Callable[..., Any]
) -> None:
    for cls in (transformers.BitsAndBytesConfig, fewbits.BitsAndBytesConfig):
        config = cls(load_in_4bit=True, llm_int8_skip_modules=["q_proj"])
        before = json.dumps(config.to_dict(), default=str)
        load(checkpoint("llama"), config)
        assert json.dumps(config.to_dict(), default=str) == before


def test_fewbits_config_is_carried_and_saved(
    checkpoint: Callable[..., Path], load: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    modules = {"down_proj": "int8:row"}
    config = fewbits.FewbitsConfig("int4:g32:zero", modules=modules, compute_dtype="float32")
    model = load(checkpoint("llama"), config)
    assert model.config.quantization_config == config
    assert model.quantization_method == "fewbits"
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == config.to_dict()
    again = load(tmp_path)
    assert again.config.quantization_config == config
    assert run(again).equal(run(model))


def test_a_dictionary_can_say_fewbits(checkpoint: Callable[..., Path], load: Callable[..., Any]) -> None:
    model = load(checkpoint("llama"), fewbits.FewbitsConfig("mxfp4").to_dict())
    assert str(model.model.layers[0].mlp.up_proj.scheme) == "mxfp4:g32"


@pytest.mark.parametrize("kind", ["transformers", "fewbits"])
def test_compute_dtype_is_that_of_the_config(
    kind: str, checkpoint: Callable[..., Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    cls = transformers.BitsAndBytesConfig if kind == "transformers" else fewbits.BitsAndBytesConfig
    dtypes = {None: torch.float32, torch.bfloat16: torch.bfloat16, "float16": torch.float16}
    for given, wanted in dtypes.items():
        config = cls(load_in_4bit=True, bnb_4bit_compute_dtype=given)
        model = load(checkpoint("llama", torch.bfloat16), config)
        assert model.model.layers[0].mlp.up_proj.compute_dtype == wanted
        model.save_pretrained(tmp_path / str(given))
        assert load(tmp_path / str(given)).model.layers[0].mlp.up_proj.compute_dtype == wanted


def test_a_quantized_checkpoint_overrules_a_config_passed_beside_it(
    checkpoint: Callable[..., Path], load: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    model = load(checkpoint("llama"), transformers.BitsAndBytesConfig(**OPTIONS["nf4_dq"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load(tmp_path, transformers.BitsAndBytesConfig(load_in_8bit=True))
    assert run(again).equal(run(model))


def test_auto_classes_and_pipelines_take_the_config(demo_model: Path) -> None:
    config = transformers.BitsAndBytesConfig(**OPTIONS["nf4_dq"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, quantization_config=config)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipe("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time") + 4
    options = {"quantization_config": config}
    piped = transformers.pipeline("text-generation", model=str(demo_model), model_kwargs=options)
    assert isinstance(piped.model.model.layers[0].mlp.up_proj, QuantLinear)
    assert piped("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"] == text


def test_real_models_stay_close_to_full_precision(
    shared_models: Path, run: Callable[..., Any], load: Callable[..., Any], tmp_path: Path
) -> None:
    """Row lengths of 172 and 352 put groups across rows."""
    for name in ("stories260k", "babyllama-char361", "tinystories-656k"):
        full = run(load(shared_models / name)).float()
        errors = {}
        for key in ("nf4_dq", "int8"):
            model = load(shared_models / name, transformers.BitsAndBytesConfig(**OPTIONS[key]))
            result = run(model)
            errors[key] = float((result.float() - full).norm() / full.norm())
            model.save_pretrained(tmp_path / name / key)
            assert run(load(tmp_path / name / key)).equal(result)
        assert 1e-4 < errors["int8"] < 0.25 * errors["nf4_dq"] < 0.25 * 0.3, name

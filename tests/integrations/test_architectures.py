"""Layers and habits of many architectures: Conv1D, ties, biases, encoders, float32 islands, new heads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import fewbits
from fewbits.nn import QuantLinear, QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]
Tensors = Callable[[Path], dict[str, Tensor]]

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
CONFIGS = {"nf4": NF4, "int8": INT8, "own": fewbits.FewbitsConfig("int4:g16:zero")}
# kind → (how many layers are quantized, what the plain model names among its linear layers and keeps)
COUNTS: dict[str, tuple[int, set[str]]] = {
    "llama": (14, {"lm_head"}),
    "llama_tied": (14, {"lm_head"}),
    "llama_bias": (14, {"lm_head"}),
    "gpt2": (8, {"lm_head"}),
    "opt": (12, {"lm_head"}),
    "bert": (13, set()),
    "roberta": (13, set()),
    "t5": (32 - 4, {"lm_head", "wo"}),
}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", COUNTS)
def test_quantize_save_reload_dequantize(
    kind: str,
    config: Any,
    checkpoint: Checkpoint,
    load: Load,
    run: Run,
    quantized: Layers,
    same_tensors: Same,
    tmp_path: Path,
) -> None:
    path = checkpoint(kind)
    plain, model = load(path), load(path, config)
    assert model.get_memory_footprint() < 0.75 * plain.get_memory_footprint()
    result = run(model)
    assert 1e-4 < relative_error(result, run(plain)) < 0.6
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert quantized(again).keys() == quantized(model).keys()
    assert run(again).equal(result)
    again.save_pretrained(tmp_path / "saved_again")
    same_tensors(tmp_path / "saved", tmp_path / "saved_again")
    model.dequantize()
    assert not quantized(model)
    if config is not INT8:  # which multiplies by rounded inputs
        torch.testing.assert_close(run(model), result, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "dequantized")
    assert run(load(tmp_path / "dequantized")).equal(run(model))


@pytest.mark.parametrize("kind", COUNTS)
def test_all_linear_layers_but_the_default_skips_are_quantized(
    kind: str, checkpoint: Checkpoint, load: Load, quantized: Layers
) -> None:
    path = checkpoint(kind)
    plain, model = load(path), load(path, NF4)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    count, kept = COUNTS[kind]
    assert len(quantized(model)) == count
    assert quantized(model).keys() == {name for name in linear if not name.endswith((*kept,))}
    for name, layer in quantized(model).items():
        weight = plain.get_parameter(f"{name}.weight")
        wanted = fewbits.quantize(weight.T if kind == "gpt2" else weight, "nf4:g64:dq")
        assert layer.quantized_weight() == wanted, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["llama_bias", "gpt2", "opt", "bert"])
def test_biases_are_kept_as_they_are(
    kind: str,
    config: Any,
    checkpoint: Checkpoint,
    load: Load,
    quantized: Layers,
    tensors_of: Tensors,
    tmp_path: Path,
) -> None:
    path = checkpoint(kind, torch.bfloat16)
    plain, model = load(path), load(path, config)
    model.save_pretrained(tmp_path)
    for one in (model, load(tmp_path)):
        biases = {name: layer.bias for name, layer in quantized(one).items() if layer.bias is not None}
        assert len(biases) >= 8
        for name, bias in biases.items():
            assert bias.equal(plain.get_parameter(f"{name}.bias"))
            assert bias.dtype == torch.bfloat16


class TestConv1D:
    """GPT-2's linear layers hold their weight as [in, out]."""

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_it_is_stored_as_out_in_and_given_back_as_in_out(
        self, config: Any, checkpoint: Checkpoint, load: Load, quantized: Layers, tmp_path: Path
    ) -> None:
        path = checkpoint("gpt2")
        plain, model = load(path), load(path, config)
        layer = quantized(model)["transformer.h.0.attn.c_attn"]
        assert isinstance(layer, QuantLinear)
        assert (layer.in_features, layer.out_features) == (64, 192)
        decoded = {name: layer.dequantize() for name, layer in quantized(model).items()}
        model.save_pretrained(tmp_path / "saved")
        for one in (model, load(tmp_path / "saved")):
            one.dequantize()
            for name, weight in decoded.items():
                module = one.get_submodule(name)
                assert type(module) is Conv1D
                assert module.nf == weight.shape[0]
                torch.testing.assert_close(module.weight, weight.T, rtol=1e-3, atol=1e-3)
                assert module.weight.is_contiguous()
                assert module.bias.equal(plain.get_parameter(f"{name}.bias"))

    def test_a_dequantized_copy_is_a_plain_checkpoint(
        self, checkpoint: Checkpoint, load: Load, run: Run, tensors_of: Tensors, tmp_path: Path
    ) -> None:
        path = checkpoint("gpt2")
        model = load(path, NF4).dequantize()
        model.save_pretrained(tmp_path)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(path).items()}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(tmp_path).items()}
        again = load(tmp_path)
        assert type(again.transformer.h[0].attn.c_attn) is Conv1D
        assert run(again).equal(run(model))


class TestTiedEmbeddings:
    @pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "opt", "t5"])
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_they_are_kept_and_stay_tied(
        self, kind: str, config: Any, checkpoint: Checkpoint, load: Load, tmp_path: Path
    ) -> None:
        path = checkpoint(kind)
        plain, model = load(path), load(path, config)
        model.save_pretrained(tmp_path)
        for one in (model, load(tmp_path), load(path, config).dequantize()):
            head, table = one.get_output_embeddings(), one.get_input_embeddings()
            assert head.weight is table.weight
            assert table.weight.equal(plain.get_input_embeddings().weight)


class TestKeptInFloat32:
    """T5 keeps `wo` in float32."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_wo_is_plain_and_as_in_the_plain_model(
        self, dtype: torch.dtype, config: Any, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        path = checkpoint("t5")
        plain, model = load(path, dtype=dtype), load(path, config, dtype=dtype)
        model.save_pretrained(tmp_path)
        for one in (model, load(tmp_path)):
            for block in (*one.encoder.block, *one.decoder.block):
                wo = block.layer[-1].DenseReluDense.wo
                assert type(wo) is nn.Linear
                assert wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
            name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
            assert one.get_parameter(name).equal(plain.get_parameter(name))
            assert run(one).isfinite().all()
        assert run(load(tmp_path)).equal(run(model))
        reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        assert "float32" in reasons[name]


class TestNewHead:
    """A checkpoint of a base model, loaded into a class with a head that it lacks."""

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize(
        ("kind", "cls", "new"),
        [
            ("bert", "BertForSequenceClassification", ["classifier"]),
            ("roberta", "RobertaForSequenceClassification", ["classifier.dense", "classifier.out_proj"]),
            ("roberta", "RobertaForTokenClassification", ["classifier"]),
        ],
    )
    def test_it_is_plain_initialised_and_reported(
        self,
        kind: str,
        cls: str,
        new: list[str],
        config: Any,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        quantized: Layers,
        tmp_path: Path,
    ) -> None:
        path = checkpoint(kind)
        read = getattr(transformers, cls).from_pretrained
        model = read(path, quantization_config=config).eval()
        plain = read(path)
        assert len(quantized(model)) >= 12
        reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        for name in new:
            layer = model.get_submodule(name)
            assert type(layer) is nn.Linear
            assert layer.weight.shape == plain.get_submodule(name).weight.shape
            assert layer.weight.dtype == torch.float32
            # BERT's initializer_range is 0.02; uninitialised memory would not look like that.
            assert 0.012 < layer.weight.std() < 0.03
            assert layer.weight.requires_grad
            assert layer.bias.count_nonzero() == 0
            assert reasons[f"{name}.weight"]
        result = run(model)
        assert result.isfinite().all()
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert run(again).equal(result)
        assert quantized(again).keys() == quantized(model).keys()

    def test_the_reason_says_that_it_is_new(self, checkpoint: Checkpoint) -> None:
        read = transformers.RobertaForSequenceClassification.from_pretrained
        model = read(checkpoint("roberta"), quantization_config=NF4)
        reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        assert reasons["classifier.dense.weight"] == "not in the checkpoint: new and random"

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize("name", ["mlp.c_proj", "attn.c_attn"])
    def test_a_missing_conv1d_is_new_too(
        self,
        name: str,
        config: Any,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        quantized: Layers,
        tensors_of: Tensors,
        tmp_path: Path,
    ) -> None:
        shutil.copytree(checkpoint("gpt2"), tmp_path / "source")
        tensors = tensors_of(tmp_path / "source")
        tensors.pop(f"transformer.h.1.{name}.weight")
        save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
        model = load(tmp_path / "source", config)
        layer = model.get_submodule(f"transformer.h.1.{name}")
        assert type(layer) is Conv1D
        # GPT-2 scales the residual projections by the square root of twice its two layers
        assert 0.005 < layer.weight.std() < 0.03
        assert len(quantized(model)) == 7
        reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        assert reasons[f"transformer.h.1.{name}.weight"] == "not in the checkpoint: new and random"
        model.save_pretrained(tmp_path / "saved")
        assert run(load(tmp_path / "saved")).equal(run(model))


def test_subclasses_of_linear_layers_are_kept_with_a_reason(new_model: Callable[..., Any]) -> None:
    class Special(nn.Linear):
        pass

    model = new_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Special
    report = fewbits.quantize_model(model, NF4_OWN)
    entry = next(e for e in report.entries if e.name == "model.layers.0.mlp.up_proj.weight")
    assert not entry.quantized
    assert "Special" in entry.reason
    assert len(report.quantized) == 13


NF4_OWN = fewbits.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

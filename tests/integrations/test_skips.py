"""Which layers are kept: the defaults of transformers, what a user adds, and what a recipe overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

import fewbits
from fewbits.nn import QuantEmbedding, QuantLinear, QuantModule, is_transposed

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]

KINDS = ["llama", "llama_tied", "llama_bias", "gpt2", "opt", "mixtral", "qwen2_moe", "gpt_oss", "bert", "t5"]


def nf4(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def linear_layers(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear or is_transposed(type(module))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_default_skips_are_those_of_transformers(
    kind: str, checkpoint: Checkpoint, load: Load, quantized: Layers
) -> None:
    path = checkpoint(kind)
    plain, model = load(path), load(path, nf4())
    skips = [*get_keys_to_not_convert(plain), *(plain._keep_in_fp32_modules or ())]
    wanted = {name for name in linear_layers(plain) if should_convert_module(name, skips)}
    assert {name for name, layer in quantized(model).items() if isinstance(layer, QuantLinear)} == wanted
    assert wanted


SKIPS: dict[str, list[str]] = {
    "llama": ["q_proj", "model.layers.1.mlp"],
    "llama_tied": ["q_proj", "model.layers.1.mlp"],
    "gpt2": ["c_attn", "transformer.h.1.mlp"],
    "opt": ["q_proj", "model.decoder.layers.1.fc1"],
    "t5": ["q", "encoder.block.1"],
}


@pytest.mark.parametrize("kind", SKIPS)
@pytest.mark.parametrize("cls", [BitsAndBytesConfig, fewbits.BitsAndBytesConfig])
class TestSkipModules:
    def test_the_list_adds_to_the_defaults(
        self,
        kind: str,
        cls: Any,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        quantized: Layers,
        tmp_path: Path,
    ) -> None:
        path, skips = checkpoint(kind, torch.bfloat16), SKIPS[kind]
        default = quantized(load(path, cls(load_in_4bit=True)))
        model = load(path, cls(load_in_4bit=True, llm_int8_skip_modules=skips))
        wanted = {name for name in default if should_convert_module(name, skips)}
        assert quantized(model).keys() == wanted
        assert 0 < len(wanted) < len(default)
        assert type(model.get_output_embeddings()) is nn.Linear
        reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        for name in default.keys() - wanted:
            assert reasons[f"{name}.weight"] == "llm_int8_skip_modules"
        # The carried list names all that was kept: where it replaces the defaults it still says the same.
        stated = model.config.quantization_config.llm_int8_skip_modules
        assert stated[: len(skips)] == skips
        everything = linear_layers(load(path))
        assert {name for name in everything if should_convert_module(name, stated)} == wanted
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert quantized(again).keys() == wanted
        assert run(again).equal(run(model))

    def test_an_empty_list_is_no_list(
        self, kind: str, cls: Any, checkpoint: Checkpoint, load: Load, quantized: Layers
    ) -> None:
        path = checkpoint(kind)
        empty = load(path, cls(load_in_8bit=True, llm_int8_skip_modules=[]))
        assert quantized(empty).keys() == quantized(load(path, cls(load_in_8bit=True))).keys()


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("model.layers.1", {"model.layers.1"}),
        ("layers.1", {"model.layers.1"}),
        (r"model\.layers\.\d+\.self_attn", {"model.layers.0.self_attn", "model.layers.1.self_attn"}),
        ("model.layers.*.mlp", {"model.layers.0.mlp", "model.layers.1.mlp"}),
        ("o_proj", {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}),
        ("model.layers.1.mlp.up", set()),
    ],
)
def test_patterns_match_as_in_transformers(
    pattern: str, kept: set[str], checkpoint: Checkpoint, load: Load, quantized: Layers
) -> None:
    path = checkpoint("llama")
    everything = quantized(load(path, nf4())).keys()
    model = load(path, nf4(llm_int8_skip_modules=[pattern]))
    wanted = {name for name in everything if should_convert_module(name, [pattern])}
    assert quantized(model).keys() == wanted
    if "." not in pattern or pattern.startswith("model"):
        covered = {name for name in everything if any(name.startswith(prefix) for prefix in kept)}
        assert everything - wanted == covered


class TestModules:
    """`FewbitsConfig(modules=…)` chooses per layer, and reaches what is otherwise kept."""

    def test_bits_per_layer(
        self,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        quantized: Layers,
        same_tensors: Same,
        tmp_path: Path,
    ) -> None:
        modules = {"model.layers.0.mlp": "int8:row", "q_proj": "int3:g16:zero"}
        modules |= {"k_proj": "skip", "v_proj": None}
        path = checkpoint("llama", torch.bfloat16)
        plain, model = load(path), load(path, fewbits.FewbitsConfig("nf4:g64", modules=modules))
        for name, layer in quantized(model).items():
            format = "int8:row" if ".0.mlp" in name else "int3:g16:zero" if "q_proj" in name else "nf4:g64"
            assert layer.quantized_weight() == fewbits.quantize(plain.get_parameter(f"{name}.weight"), format)
        kept = linear_layers(plain) - quantized(model).keys()
        assert {name.rpartition(".")[2] for name in kept} == {"k_proj", "v_proj", "lm_head"}
        assert len(kept) == 5
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert run(again).equal(run(model))
        assert {n: str(x.scheme) for n, x in quantized(again).items()} == {
            n: str(x.scheme) for n, x in quantized(model).items()
        }
        again.save_pretrained(tmp_path / "again")
        same_tensors(tmp_path / "saved", tmp_path / "again")

    @pytest.mark.parametrize("format", ["nf4:g64:dq", "int8:row", "int4:g16:zero"])
    @pytest.mark.parametrize("default", ["nf4:g64", "skip"])
    def test_an_untied_head(
        self, format: str, default: str, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        path = checkpoint("llama", torch.bfloat16)
        plain = load(path)
        model = load(path, fewbits.FewbitsConfig(default, modules={"lm_head": format}))
        assert model.lm_head.quantized_weight() == fewbits.quantize(plain.lm_head.weight, format)
        assert type(model.model.embed_tokens) is nn.Embedding
        assert model.dtype == torch.bfloat16
        model.save_pretrained(tmp_path)
        assert run(load(tmp_path)).equal(run(model))

    @pytest.mark.parametrize("format", ["nf4:g64:dq", "int8:row", "int4:g16:zero"])
    @pytest.mark.parametrize("default", ["nf4:g64", "skip"])
    def test_an_untied_embedding(
        self, format: str, default: str, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        path = checkpoint("llama", torch.bfloat16)
        plain = load(path)
        model = load(path, fewbits.FewbitsConfig(default, modules={"embed_tokens": format}))
        table = model.model.embed_tokens
        assert isinstance(table, QuantEmbedding)
        wanted = fewbits.quantize(plain.model.embed_tokens.weight, format)
        assert table.quantized_weight() == wanted
        ids = torch.tensor([[5, 5, 0, 95]])
        assert table(ids).equal(wanted.dequantize()[ids])
        assert table.padding_idx == plain.model.embed_tokens.padding_idx
        assert type(model.lm_head) is nn.Linear
        assert model.dtype == torch.bfloat16
        assert model.get_memory_footprint() < plain.get_memory_footprint()
        model.save_pretrained(tmp_path)
        assert run(load(tmp_path)).equal(run(model))

    @pytest.mark.parametrize("kind", ["llama_tied", "opt", "t5"])
    @pytest.mark.parametrize("named", ["head", "embedding", "both"])
    @pytest.mark.parametrize("format", ["nf4:g64:dq", "int8:row", "int4:g16:zero"])
    def test_tied_layers_share_one_quantized_weight(
        self,
        kind: str,
        named: str,
        format: str,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        same_tensors: Same,
        tmp_path: Path,
    ) -> None:
        table = {"llama_tied": "embed_tokens", "opt": "embed_tokens", "t5": "encoder.embed_tokens"}[kind]
        modules = {"head": ["lm_head"], "embedding": [table], "both": ["lm_head", table]}[named]
        path = checkpoint(kind, torch.bfloat16)
        plain = load(path)
        model = load(path, fewbits.FewbitsConfig("nf4:g64:dq", modules=dict.fromkeys(modules, format)))
        model.save_pretrained(tmp_path / "saved")
        wanted = fewbits.quantize(plain.get_input_embeddings().weight, format)
        for one in (model, load(tmp_path / "saved")):
            head, embedding = one.get_output_embeddings(), one.get_input_embeddings()
            assert isinstance(head, QuantLinear)
            assert isinstance(embedding, QuantEmbedding)
            assert embedding.quantized_weight() == wanted
            assert head.quantized_weight() == wanted
            for mine, other in zip(head._parts(), embedding._parts(), strict=True):
                assert mine.data_ptr() == other.data_ptr()
            for name in [*plain.all_tied_weights_keys, *plain.all_tied_weights_keys.values()]:
                module = one.get_submodule(name.removesuffix(".weight"))
                assert isinstance(module, QuantLinear | QuantEmbedding), name
                assert module.weight.data_ptr() == embedding.weight.data_ptr()
            tables = [entry for entry in fewbits.report(one).quantized if entry.shape == (96, 64)]
            assert [entry.stored for entry in tables] == [format]
            assert run(one).equal(run(model))
        load(tmp_path / "saved").save_pretrained(tmp_path / "again")
        same_tensors(tmp_path / "saved", tmp_path / "again")
        result, full = run(model).float(), run(plain).float()
        assert (result - full).norm() / full.norm() < 0.7
        model.dequantize()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_input_embeddings().weight.equal(wanted.dequantize())
        # In bfloat16 through several layers; the kernels round the codebook, decoding rounds each weight.
        assert (run(model).float() - result).norm() / result.norm() < 0.1

    def test_two_formats_for_one_tied_weight_are_refused(self, checkpoint: Checkpoint, load: Load) -> None:
        config = fewbits.FewbitsConfig(modules={"lm_head": "int8:row", "embed_tokens": "nf4:g64"})
        with pytest.raises(ValueError, match="share one weight") as raised:
            load(checkpoint("llama_tied"), config)
        for name in ("lm_head", "model.embed_tokens", "int8:row", "nf4:g64"):
            assert name in str(raised.value)

    def test_the_untied_copy_of_a_real_model(
        self, demo_model: Path, load: Load, run: Run, tmp_path: Path
    ) -> None:
        everything = {"lm_head": "int8:row", "embed_tokens": "int8:row"}
        model = load(demo_model, fewbits.FewbitsConfig("nf4:g64:dq", modules=everything))
        assert fewbits.report(model).bits_per_weight < 5.0
        model.save_pretrained(tmp_path)
        assert run(load(tmp_path)).equal(run(model))

    def test_what_transformers_keeps_in_float32_can_be_named(
        self, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        config = fewbits.FewbitsConfig(modules={"wo": "int8:row"})
        model = load(checkpoint("t5"), config)
        assert isinstance(model.encoder.block[0].layer[-1].DenseReluDense.wo, QuantLinear)
        model.save_pretrained(tmp_path)
        assert run(load(tmp_path)).equal(run(model))

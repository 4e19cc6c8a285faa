"""Merging adapters: every tensor as PEFT's own merge_and_unload gives it, on both bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbits import FewbitsConfig
from fewbits.checkpoint.adapter import open_adapter
from fewbits.checkpoint.folder import open_folder
from fewbits.checkpoint.safetensors import CheckpointError
from fewbits.config import BitsAndBytesConfig
from fewbits.integrations.decoded import decoded_folder
from fewbits.integrations.merging import assembled, plan

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "v_proj"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

Merged = dict[str, Tensor]

# what is adapted → (kind of model, settings of LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "all linear": ("llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "r": 5}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"^model\.layers\.1.*v_proj": 6},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "dora": ("llama", {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    "saved modules": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "lora bias": ("llama_bias", {"target_modules": [*ATTENTION, "down_proj"], "lora_bias": True}),
    "all biases": ("llama_bias", {"target_modules": ATTENTION, "bias": "all"}),
    "biases of adapted layers": ("llama_bias", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d with dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one parameter of experts": (
        "qwen3_moe",
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.down_proj"], "r": 2},
    ),
    "transposed experts": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], "r": 3},
    ),
}


def new_adapter(folder: Path, path: Path, settings: dict[str, Any], load: Callable[..., Any]) -> Path:
    """An adapter of the model in `folder` with random values everywhere, saved by PEFT."""
    model = load(folder)
    # what reaches the sources of another adapter is not trained; give all that is saved values of its own
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                low = 0.05 if "lora_" in name and "magnitude" not in name else 0.02
                parameter.add_(torch.randn_like(parameter) * low)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted(
    checkpoint: Callable[..., Path], load: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """adapted(case, dtype): (base, adapter), made once."""
    made: dict[tuple[str, torch.dtype], tuple[Path, Path]] = {}

    def of(case: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        if (case, dtype) not in made:
            kind, settings = CASES[case]
            base = checkpoint(kind, dtype)
            path = tmp_path_factory.mktemp("adapter")
            made[case, dtype] = base, new_adapter(base, path, settings, load)
        return made[case, dtype]

    return of


def merged_by_peft(model: Any, adapter: Path, path: Path, tensors_of: Callable[..., Merged]) -> Merged:
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    merged.save_pretrained(path)
    return tensors_of(path)


def assert_same(found: Merged, wanted: Merged, *, ulps: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=ulps * torch.finfo(tensor.dtype).eps,
            atol=1e-7 * ulps,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_changed(found: Merged, base: Merged) -> None:
    assert any(not torch.equal(found[name], base[name]) for name in base), "the adapter changed nothing"


@pytest.mark.parametrize("case", CASES)
def test_merging_equals_peft(case, adapted, load, tmp_path, tensors_of):
    base, adapter = adapted(case)
    folder = open_folder(base)
    found = assembled(folder, plan(folder, open_adapter(adapter)))
    wanted = merged_by_peft(load(base), adapter, tmp_path / "peft", tensors_of)
    assert_same(found, wanted, ulps=8)
    assert_changed(found, tensors_of(base))


@pytest.mark.parametrize("case", ["plain", "dora", "conv1d", "experts", "embedding"])
def test_merging_into_decoded_weights_equals_peft(case, adapted, load, tmp_path, tensors_of):
    base, adapter = adapted(case)
    folder = open_folder(base)
    quantization = FewbitsConfig("nf4:g64") if case == "experts" else NF4
    found = assembled(folder, plan(folder, open_adapter(adapter), quantization))
    dequantized = load(base, quantization).dequantize()
    wanted = merged_by_peft(dequantized, adapter, tmp_path / "peft", tensors_of)
    assert_same(found, wanted, ulps=8)
    original = assembled(folder, plan(folder, open_adapter(adapter)))
    assert any(not torch.equal(found[name], original[name]) for name in found)


def test_a_16_bit_base_is_rounded_once(adapted, load, tmp_path, tensors_of):
    base, adapter = adapted("plain", torch.bfloat16)
    folder = open_folder(base)
    found = assembled(folder, plan(folder, open_adapter(adapter)))
    wanted = merged_by_peft(load(base, dtype=torch.bfloat16), adapter, tmp_path / "peft", tensors_of)
    assert_same(found, wanted)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("all linear", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        ("dora", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)),
        ("plain", BitsAndBytesConfig(load_in_8bit=True)),
        ("plain", FewbitsConfig("int4:g16:f16:zero")),
        ("saved modules", FewbitsConfig("nf4:g64", modules={"embed_tokens": "int8"})),
        ("conv1d", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        ("conv1d", FewbitsConfig("fp4:g64")),
        ("experts", FewbitsConfig("int8:g32")),
        ("transposed experts", FewbitsConfig("nf4:g64")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_merging_into_a_quantized_checkpoint_equals_peft(case, config, adapted, load, tmp_path, tensors_of):
    base, adapter = adapted(case)
    quantized = load(base, config)
    quantized.save_pretrained(tmp_path / "quantized")
    folder = decoded_folder(open_folder(tmp_path / "quantized"))
    for name in folder.files:
        folder.check(name, lambda _: None)
    found = assembled(folder, plan(folder, open_adapter(adapter)))
    wanted = merged_by_peft(quantized.dequantize(), adapter, tmp_path / "peft", tensors_of)
    assert_same(found, wanted, ulps=8)


def test_adapters_of_single_experts(checkpoint, tmp_path, tensors_of):
    """As transformers 4 named them: one branch for each expert, by the names that are in the files."""
    base = checkpoint("mixtral")
    name = next(one for one in tensors_of(base) if one.endswith("experts.1.w1.weight"))
    weight = tensors_of(base)[name]
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    path = f"base_model.model.{name.removesuffix('.weight')}"
    adapter = written(tmp_path, {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
    folder = open_folder(base)
    found = assembled(folder, plan(folder, open_adapter(adapter)))
    assert_same(found, {**tensors_of(base), name: weight + b @ a * 2}, ulps=8)


def test_names_from_before_a_renaming(checkpoint, tmp_path, tensors_of):
    """A bare encoder's tensors are found by the names that a model with a head gives them."""
    base = checkpoint("bert")
    name = "encoder.layer.0.attention.self.query"
    weight = tensors_of(base)[f"{name}.weight"]
    path = f"base_model.model.bert.{name}"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(64, 2)}
    folder = open_folder(base)
    found = assembled(folder, plan(folder, open_adapter(written(tmp_path, tensors))))
    torch.testing.assert_close(found[f"{name}.weight"], weight + 4)


def written(path: Path, tensors: Merged, **settings: Any) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors"
    )
    return path


EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


class TestTies:
    """A tied embedding is one tensor with two uses: both are changed alike, or nothing is."""

    def changed(self, checkpoint: Any, path: Path, tensors: Merged) -> tuple[Merged, Merged]:
        folder = open_folder(checkpoint("llama_tied"))
        found = assembled(folder, plan(folder, open_adapter(written(path, tensors))))
        return found, {name: folder.read(name) for name in folder.files}

    def test_both_alike(self, checkpoint, tmp_path):
        a, b = torch.randn(2, 96), torch.randn(64, 2)
        tensors = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
        tensors |= {f"{HEAD}.lora_A.weight": b.T, f"{HEAD}.lora_B.weight": a.T}
        found, base = self.changed(checkpoint, tmp_path, tensors)
        name = "model.embed_tokens.weight"
        torch.testing.assert_close(found[name], base[name] + (b @ a).T * 2)

    def test_both_replaced_by_the_same(self, checkpoint, tmp_path):
        weight = torch.randn(96, 64)
        found, _ = self.changed(
            checkpoint, tmp_path, {f"{EMBEDDING}.weight": weight, f"{HEAD}.weight": weight.clone()}
        )
        assert torch.equal(found["model.embed_tokens.weight"], weight)
        assert "lm_head.weight" not in found

    @pytest.mark.parametrize("only", [EMBEDDING, HEAD])
    def test_one_side(self, checkpoint, tmp_path, only):
        with pytest.raises(CheckpointError, match=r"are one tensor in this model.*Untie"):
            self.changed(checkpoint, tmp_path, {f"{only}.weight": torch.randn(96, 64)})

    def test_differently(self, checkpoint, tmp_path):
        tensors = {f"{EMBEDDING}.weight": torch.randn(96, 64), f"{HEAD}.weight": torch.randn(96, 64)}
        with pytest.raises(CheckpointError, match="both, differently"):
            self.changed(checkpoint, tmp_path, tensors)


class TestRefusing:
    Q = "base_model.model.model.layers.0.self_attn.q_proj"

    def refusal(self, base: Path, path: Path, tensors: Merged, **settings: Any) -> str:
        folder = open_folder(base)
        with pytest.raises(CheckpointError) as error:
            plan(folder, open_adapter(written(path, tensors, **settings)))
        return str(error.value)

    def pair(self, name: str, out: int = 64, into: int = 64) -> Merged:
        return {f"{name}.lora_A.weight": torch.ones(2, into), f"{name}.lora_B.weight": torch.ones(out, 2)}

    def test_tensors_without_a_place(self, checkpoint, tmp_path):
        tensors = self.pair(self.Q) | self.pair("base_model.model.model.layers.9.self_attn.q_proj")
        said = self.refusal(checkpoint("llama"), tmp_path, tensors)
        assert "1 tensors have no place in LlamaForCausalLM" in said
        assert "layers.9.self_attn.q_proj.lora_A" in said

    def test_a_bias_that_the_base_has_not(self, checkpoint, tmp_path):
        tensors = self.pair(self.Q) | {f"{self.Q}.lora_B.bias": torch.ones(64)}
        assert "q_proj.lora_B.bias" in self.refusal(checkpoint("llama"), tmp_path, tensors)

    def test_other_shapes(self, checkpoint, tmp_path):
        said = self.refusal(checkpoint("llama"), tmp_path, self.pair(self.Q, out=32))
        assert "in rank 2 takes [2, 64] and [64, 2]" in said

    def test_a_rank_that_the_config_has_not(self, checkpoint, tmp_path):
        assert "in rank 3 takes" in self.refusal(checkpoint("llama"), tmp_path, self.pair(self.Q), r=3)

    def test_a_vocabulary_that_grew(self, checkpoint, tmp_path):
        said = self.refusal(checkpoint("llama"), tmp_path, {f"{HEAD}.weight": torch.ones(97, 64)})
        assert "resize the base" in said

    def test_an_embedding_that_is_none(self, checkpoint, tmp_path):
        tensors = {
            f"{self.Q}.lora_embedding_A": torch.ones(2, 64),
            f"{self.Q}.lora_embedding_B": torch.ones(64, 2),
        }
        assert "have no place" in self.refusal(checkpoint("llama"), tmp_path, tensors)

    def test_more_branches_than_parameters(self, checkpoint, tmp_path):
        tensors = self.pair(self.Q) | self.pair(f"{self.Q}.base_layer")
        assert "have no place" in self.refusal(checkpoint("llama"), tmp_path, tensors)

    @pytest.mark.parametrize("part", ["pair", "saved"])
    def test_two_names_for_one_tensor(self, checkpoint, tmp_path, part):
        """`bert.` in front is what a model with a head calls a bare encoder's modules."""
        module = "encoder.layer.0.attention.self.query"
        tensors: Merged = {}
        for place, prefix in enumerate(("bert.", "")):
            name = f"base_model.model.{prefix}{module}"
            if part == "saved":
                tensors[f"{name}.weight"] = torch.full((64, 64), float(place))
            else:
                tensors |= self.pair(name)
        said = self.refusal(checkpoint("bert"), tmp_path, tensors)
        assert "are two names for one change of" in said
        assert f"base_model.model.{module}" in said
        assert f"base_model.model.bert.{module}" in said

    def test_a_base_that_is_quantized(self, checkpoint, tmp_path, load):
        (tmp_path / "adapter").mkdir()
        load(checkpoint("llama"), NF4).save_pretrained(tmp_path / "quantized")
        folder = open_folder(tmp_path / "quantized")
        with pytest.raises(CheckpointError, match="is quantized"):
            plan(folder, open_adapter(written(tmp_path / "adapter", self.pair(self.Q))))

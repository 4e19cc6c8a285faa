"""Why weights were kept, and what part they play, by the files and names alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.safetensors import CheckpointError
from fewbits.checkpoint.stored import ROLES, role_of, stored_weights
from fewbits.config import FewbitsConfig

from .conftest import found_in, own, write

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes"
REASONS = {
    "model.embed_tokens.weight": "embedding: kept unless named",
    "lm_head.weight": "output head: kept unless named",
    "model.layers.0.mlp.gate.weight": "router",
    "model.layers.0.self_attn.k_proj.weight": "named in llm_int8_skip_modules",
    "model.layers.0.mlp.up_proj.bias": "1-dimensional",
    "model.scale": "0-dimensional",
    "model.layers.0.conv.weight": "no linear layer",
    "model.layers.0.mlp.experts.up_proj": "bitsandbytes quantizes linear layers only",
    "model.layers.0.mystery.weight": "the files do not say",
}
SHAPES = {
    "model.scale": (),
    "model.layers.0.mlp.up_proj.bias": (4,),
    "model.layers.0.conv.weight": (2, 2, 2),
    "model.layers.0.mlp.experts.up_proj": (2, 2, 2),
}


class TestReasons:
    def folder(self, path: Path, quantization: dict[str, Any], *missing: str, **config: Any) -> Folder:
        loaded = safetensors.torch.load_file(GOLDEN / "int8" / "model.safetensors")
        tensors = {name: tensor for name, tensor in loaded.items() if "q_proj" in name}
        tensors |= {name: torch.ones(SHAPES.get(name, (2, 2))) for name in REASONS if name not in missing}
        return write(path, tensors, {"quant_method": "bitsandbytes", **quantization}, **config)

    def test_by_name_and_config(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, {"llm_int8_skip_modules": ["k_proj", "(", 3]})
        reasons = {name: weight.reason for name, weight in found_in(folder).items() if not weight.quantized}
        assert reasons == {**REASONS, "model.layers.0.self_attn.q_proj.bias": "1-dimensional"}

    @pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore", "ignored_layers"])
    def test_other_skip_lists(self, tmp_path: Path, key: str) -> None:
        folder = self.folder(tmp_path, {key: ["re:.*myst"]})
        assert found_in(folder)["model.layers.0.mystery.weight"].reason == "the files do not say"
        folder = self.folder(tmp_path, {key: ["re:.*mystery"]})
        assert found_in(folder)["model.layers.0.mystery.weight"].reason == f"named in {key}"

    def test_a_tied_embedding(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, {}, "lm_head.weight", tie_word_embeddings=True)
        assert found_in(folder)["model.embed_tokens.weight"].reason == "embedding (tied): kept unless named"

    def test_own_config(self, tmp_path: Path) -> None:
        folder, _ = own(tmp_path, FewbitsConfig("nf4:g64", {"lm_head": "skip", "layers.0": "skip"}))
        weights = found_in(folder)
        assert weights["lm_head.weight"].reason == 'modules["lm_head"]: skip'
        assert weights["layers.0.q_proj.weight"].reason == 'modules["layers.0"]: skip'
        assert weights["layers.0.experts.gate_up_proj"].reason == 'modules["layers.0"]: skip'
        assert weights["embed_tokens.weight"].reason == "embedding: kept unless named"
        assert weights["layers.1.q_proj.weight"].reason == ""

    def test_what_fewbits_quantize_noted_goes_first(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, {"llm_int8_skip_modules": ["k_proj"]})
        noted = [
            {"name": "model.layers.0.mystery.weight", "stored": "float32", "reason": "noted"},
            {"name": "lm_head.weight", "reason": ""},
        ]
        (tmp_path / "fewbits.json").write_text(json.dumps({"weights": noted}))
        weights = found_in(folder)
        assert weights["model.layers.0.mystery.weight"].reason == "noted"
        assert weights["lm_head.weight"].reason == "output head: kept unless named"

    @pytest.mark.parametrize(
        "text",
        [
            '{"weights": 3}',
            '{"weights": [3]}',
            '{"weights": {"a": 1}}',
            '{"weights": [{"name": "a"}]}',
            '{"weights": [{"name": [], "reason": ""}]}',
            '{"weights": [{"name": "a", "reason": null}]}',
            "[]",
        ],
    )
    def test_odd_side_files(self, tmp_path: Path, text: str) -> None:
        folder = self.folder(tmp_path, {})
        (tmp_path / "fewbits.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"fewbits.json"):
            stored_weights(folder)


NAMES = {
    "embedding": """
        model.embed_tokens.weight  transformer.wte.weight  transformer.wpe.weight  shared.weight
        transformer.word_embeddings.weight  gpt_neox.embed_in.weight
        bert.embeddings.position_embeddings.weight  model.decoder.embed_positions.weight
        model.vision_tower.patch_embed.proj.weight
    """,
    "attention": """
        model.layers.0.self_attn.q_proj.weight  transformer.h.0.attn.c_attn.weight
        transformer.h.0.attn.c_proj.bias  transformer.h.0.self_attention.query_key_value.weight
        transformer.h.0.self_attention.dense.weight  model.layers.3.self_attn.dense.weight
        model.layers.0.attention.wo.weight  encoder.block.0.layer.0.SelfAttention.q.weight
        decoder.block.0.layer.1.EncDecAttention.o.weight
        bert.encoder.layer.0.attention.output.dense.weight  model.layers.0.self_attn.rotary_emb.inv_freq
    """,
    "mlp": """
        model.layers.0.mlp.down_proj.weight  transformer.h.0.mlp.c_fc.weight
        model.decoder.layers.0.fc1.weight  transformer.h.0.mlp.dense_h_to_4h.weight
        encoder.block.0.layer.1.DenseReluDense.wi_0.weight  model.layers.0.mlp.gate_proj.weight
        model.layers.0.feed_forward.w1.weight  bert.encoder.layer.0.intermediate.dense.weight
        bert.encoder.layer.0.output.dense.weight
    """,
    "experts": """
        model.layers.0.block_sparse_moe.experts.0.w1.weight  model.layers.0.mlp.experts.gate_up_proj
        model.layers.0.mlp.shared_expert.up_proj.weight  model.layers.0.mlp.shared_experts.up_proj.weight
        model.layers.0.mlp.experts.gate_up_proj_bias
    """,
    "router": """
        model.layers.0.block_sparse_moe.gate.weight  model.layers.0.mlp.router.weight
        model.layers.0.mlp.gate.weight  model.layers.0.mlp.shared_expert_gate.weight
    """,
    "norm": """
        model.norm.weight  model.layers.0.input_layernorm.weight  transformer.h.0.ln_1.weight
        transformer.ln_f.bias  transformer.word_embeddings_layernorm.weight
        model.layers.0.self_attn.q_norm.weight  model.decoder.layers.0.self_attn_layer_norm.weight
        transformer.h.0.ln_attn.weight  model.layers.0.pre_feedforward_layernorm.weight
        bert.embeddings.LayerNorm.weight
    """,
    "output head": """
        lm_head.weight  lm_head.bias  embed_out.weight  score.weight  classifier.dense.weight
        cls.predictions.decoder.weight  output.weight
    """,
    "other": """
        model.layers.0.mixer.A_log  model.layers.0.mixer.conv1d.weight  x
    """,
}


@pytest.mark.parametrize(
    ("name", "role"), [(name, role) for role, names in NAMES.items() for name in names.split()]
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role
    assert role in ROLES

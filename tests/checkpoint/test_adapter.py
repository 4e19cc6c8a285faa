"""Adapters as files: what is read of them, what is refused, and the arithmetic against its formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbits.checkpoint import adapter as module
from fewbits.checkpoint.adapter import Adapter, Branch, Change, merged, open_adapter, shape_problem
from fewbits.checkpoint.safetensors import CheckpointError

Q = "base_model.model.layers.0.q_proj"
RANK, OUT, INTO = 3, 6, 10

New = Callable[..., Path]


@pytest.fixture
def new(tmp_path: Path) -> New:
    """new(tensors, **settings): the folder of an adapter."""

    def write(tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
        if tensors is None:
            tensors = pair()
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, **settings}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def pair(name: str = Q, rank: int = RANK, out: int = OUT, into: int = INTO) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.randn(rank, into), f"{name}.lora_B.weight": torch.randn(out, rank)}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_adapter(path)
    return str(error.value)


def change(adapter: Adapter, **settings: Any) -> Change:
    (branch,) = adapter.branches
    return Change(branch=branch, rank=RANK, scale=adapter.scale(branch.module), **settings)


class TestReading:
    def test_a_pair_becomes_a_branch(self, new: New) -> None:
        adapter = open_adapter(new())
        assert adapter.branches == (Branch("layers.0.q_proj", 0, f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),)
        assert adapter.saved == {}
        assert len(adapter.digest) == 64

    @pytest.mark.parametrize(
        ("tensor", "name"),
        [
            ("lm_head.weight", "lm_head.weight"),
            ("x.modules_to_save.weight", "x.weight"),
            ("x.base_layer.bias", "x.bias"),
        ],
    )
    def test_what_replaces_a_tensor(self, new: New, tensor: str, name: str) -> None:
        full = f"base_model.model.{tensor}"
        adapter = open_adapter(new({full: torch.ones(2)}))
        assert adapter.saved == {name: full}

    def test_nested_branches_know_their_depth(self, new: New) -> None:
        inner = "base_model.model.experts.base_layer"
        found = open_adapter(new(pair("base_model.model.experts") | pair(inner))).branches
        assert {(one.module, one.depth) for one in found} == {("experts", 0), ("experts", 1)}

    def test_scales(self, new: New) -> None:
        patterns = {"rank_pattern": {"q_proj": 8, r"layers\.1\..*": 2}, "alpha_pattern": {"v_proj": 1}}
        adapter = open_adapter(new(**patterns))
        assert adapter.scale("layers.0.q_proj") == 4 / 8
        assert adapter.scale("layers.1.x") == 4 / 2
        assert adapter.scale("layers.0.v_proj") == 1 / 3
        assert adapter.scale("layers.0.not_q_proj") == 4 / 3
        assert open_adapter(new(use_rslora=True)).scale("x") == 4 / math.sqrt(3)

    def test_the_card_tells_how_the_base_was_quantized(self, new: New) -> None:
        path = new()
        text = (
            "## Training procedure\n\n"
            "The following `bitsandbytes` quantization config was used during training:\n"
            "- quant_method: bitsandbytes\n- load_in_4bit: True\n- bnb_4bit_quant_type: nf4\n"
            "- bnb_4bit_use_double_quant: True\n- llm_int8_threshold: 6.0\n- evil: __import__('os')\n"
        )
        (path / "README.md").write_text(text)
        assert open_adapter(path).quantization == {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
        (path / "README.md").write_text("- load_in_4bit: True\n")
        assert open_adapter(path).quantization is None


class TestRefusing:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
            ({"use_qalora": True, "layer_replication": [[0, 1]]}, "layer_replication, use_qalora"),
            ({"trainable_token_indices": [3]}, "trainable_token_indices"),
            ({"a_setting_of_the_future": 1}, "a_setting_of_the_future"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
            ({"init_lora_weights": "loftq"}, "changes the base"),
            ({"r": 0}, "rank of 0"),
            ({"r": 2**40}, "rank of 1099511627776"),
            ({"r": True}, "rank of True"),
            ({"rank_pattern": {"q": "8"}}, "rank of '8'"),
            ({"lora_alpha": float("nan")}, "lora_alpha of nan"),
            ({"alpha_pattern": [1]}, "alpha_pattern maps no names"),
            ({"rank_pattern": {"(a*)*b": 2}}, "no simple expression"),
            ({"rank_pattern": {".*.*.*.*x": 2}}, "no simple expression"),
            ({"rank_pattern": {"a?" * 24 + "a" * 24: 2}}, "no simple expression"),
            ({"rank_pattern": {"(a|aa)" * 40 + "b": 2}}, "no simple expression"),
            ({"rank_pattern": {"\\\\*" * 60 + "b": 2}}, "no simple expression"),
            ({"rank_pattern": {"(?x:(a|aa) *b)": 2}}, "no simple expression"),
            ({"rank_pattern": {"(": 2}}, "no simple expression"),
            ({"target_parameters": "experts"}, "target_parameters"),
        ],
    )
    def test_settings(self, new: New, settings: dict[str, Any], said: str) -> None:
        assert said in refusal(new(**settings))

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({f"{Q}.lora_A.weight": torch.ones(3, 4)}, "has no lora_B"),
            ({f"{Q}.lora_B.weight": torch.ones(3, 4)}, "has no lora_A"),
            ({f"{Q}.ia3_l": torch.ones(3)}, "of no LoRA adapter"),
            ({f"{Q}.lora_velora_embed": torch.ones(3)}, "of no LoRA adapter"),
            ({"q_proj.lora_A.weight": torch.ones(3, 4)}, "of no LoRA adapter of a whole model"),
            (pair() | {f"{Q}.lora_A.weight": torch.ones(2, 4)}, "no two matrices"),
            (pair() | {f"{Q}.lora_A.weight": torch.ones(3, 4, 1, 1)}, "no two matrices"),
            (pair() | {f"{Q}.lora_embedding_A": torch.ones(3)}, "has no lora_embedding_B"),
            ({f"{Q}.weight": torch.ones(3, dtype=torch.int8)}, "is I8"),
            (
                {f"base_model.model.x{middle}.weight": torch.ones(1) for middle in ("", ".base_layer")},
                "are one",
            ),
            ({}, "holds no tensors"),
        ],
    )
    def test_tensors(self, new: New, tensors: dict[str, Tensor], said: str) -> None:
        assert said in refusal(new(tensors))

    def test_long_names(self, new: New) -> None:
        fine = open_adapter(new(pair(f"base_model.model.{'a' * 460}")))
        assert len(fine.branches) == 1
        assert "names of more than 500 characters" in refusal(new(pair(f"base_model.model.{'a.' * 300}q")))

    @pytest.mark.parametrize(
        "pattern",
        [
            "q_proj",
            r"layers\.\d+\.mlp",
            r".*\.layers\.[0-3]\..*q_proj",
            r"model\.layers\.(0|1|2)\.self_attn\.(q|k)_proj",
            r"layers\.(?:0|1)\..*?_proj",
            r"^model\.layers\.1.*v_proj",
        ],
    )
    def test_common_patterns_are_not_refused(self, new: New, pattern: str) -> None:
        assert open_adapter(new(rank_pattern={pattern: 2})).config["rank_pattern"] == {pattern: 2}

    def test_pickles(self, new: New) -> None:
        path = new()
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        said = refusal(path)
        assert "pickle" in said
        assert "save_pretrained" in said

    def test_files_that_are_cut_off(self, new: New) -> None:
        weights = new() / "adapter_model.safetensors"
        whole = weights.read_bytes()
        for length in (0, 7, 100, len(whole) - 1):
            weights.write_bytes(whole[:length])
            assert "adapter_model.safetensors" in refusal(weights.parent)

    def test_links_out_of_the_folder(self, new: New, tmp_path_factory: pytest.TempPathFactory) -> None:
        weights = new() / "adapter_model.safetensors"
        outside = tmp_path_factory.mktemp("other") / "secret.safetensors"
        weights.rename(outside)
        weights.symlink_to(outside)
        assert "link out of its folder" in refusal(weights.parent)

    def test_what_is_no_adapter(self, tmp_path: Path) -> None:
        assert "adapter_config.json" in refusal(tmp_path)
        (tmp_path / "adapter_config.json").write_text("[]")
        assert "no JSON object" in refusal(tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        assert "has no adapter_model.safetensors" in refusal(tmp_path)


class TestArithmetic:
    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("block", [1, 25, 2**22])
    def test_low_rank(self, new: New, monkeypatch: pytest.MonkeyPatch, block: int, turned: bool) -> None:
        monkeypatch.setattr(module, "_BLOCK", block)
        tensors = pair()
        adapter = open_adapter(new(tensors))
        weight = torch.randn(OUT, INTO)
        wanted = weight + 4 / 3 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
        given = weight.T.contiguous() if turned else weight
        found = merged(adapter, change(adapter, turned=turned), given, torch.float32, "q")
        torch.testing.assert_close(found, wanted.T if turned else wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounds_once(self, new: New, dtype: torch.dtype) -> None:
        tensors = pair()
        adapter = open_adapter(new(tensors))
        weight = torch.randn(OUT, INTO).to(dtype)
        delta = 4 / 3 * (tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"])
        found = merged(adapter, change(adapter), weight, dtype, "q")
        off = (found.double() - (weight.double() + delta.double())).abs()
        assert (off <= (weight.double() + delta).abs() * torch.finfo(dtype).eps * 0.501 + 1e-9).all()

    def test_dora_gives_rows_their_magnitude(self, new: New) -> None:
        magnitude = torch.rand(OUT) + 0.5
        adapter = open_adapter(new(pair() | {f"{Q}.lora_magnitude_vector": magnitude}, use_dora=True))
        found = merged(adapter, change(adapter), torch.randn(OUT, INTO), torch.float32, "q")
        torch.testing.assert_close(found.norm(dim=1), magnitude)

    @pytest.mark.parametrize("turned", [False, True])
    def test_experts(self, new: New, turned: bool) -> None:
        count = 4
        a, b = torch.randn(count * RANK, INTO), torch.randn(OUT, RANK * count)
        adapter = open_adapter(new({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}))
        weight = torch.randn(count, OUT, INTO)
        # the expert is the slow index of A, and the fast one of B
        delta = torch.einsum("ore,eri->eoi", b.view(OUT, RANK, count), a.view(count, RANK, INTO)) * 4 / 3
        given = weight.transpose(1, 2).contiguous() if turned else weight
        found = merged(adapter, change(adapter, turned=turned), given, torch.float32, "q")
        torch.testing.assert_close(found.transpose(1, 2) if turned else found, weight + delta)

    def test_saved_tensors_and_biases(self, new: New) -> None:
        saved, bias = torch.randn(5), torch.randn(5)
        names = {"base_model.model.x.bias": saved, f"{Q}.lora_B.bias": bias}
        adapter = open_adapter(new(pair() | names))
        both = Change(saved="base_model.model.x.bias", bias=f"{Q}.lora_B.bias", scale=2.0)
        found = merged(adapter, both, torch.zeros(5), torch.float32, "x")
        torch.testing.assert_close(found, saved + 2 * bias)

    def test_a_result_that_is_too_large_is_named(self, new: New) -> None:
        tensors = {name: 1e4 * tensor for name, tensor in pair().items()}
        adapter = open_adapter(new(tensors))
        weight = torch.zeros(OUT, INTO, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"q_proj\.weight is not finite in torch\.float16"):
            merged(adapter, change(adapter), weight, torch.float16, "q_proj.weight")

    @pytest.mark.parametrize(
        ("shape", "settings", "said"),
        [
            ((OUT, INTO), {}, None),
            ((INTO, OUT), {"turned": True}, None),
            ((INTO, OUT), {}, "do not fit w"),
            ((OUT, INTO), {"turned": True}, "do not fit w"),
            ((2, OUT, INTO), {}, "in rank 3 takes [6, 10] and [6, 6]"),
            ((OUT,), {}, "no low-rank branch fits"),
        ],
    )
    def test_shapes(
        self, new: New, shape: tuple[int, ...], settings: dict[str, Any], said: str | None
    ) -> None:
        adapter = open_adapter(new())
        problem = shape_problem(adapter, change(adapter, **settings), "w", shape)
        assert problem is None if said is None else said in str(problem)

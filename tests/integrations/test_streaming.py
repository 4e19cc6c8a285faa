"""File to file equals loading on the fly: every byte, for every kind of model and config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbits
from fewbits.checkpoint.finish import finish
from fewbits.checkpoint.folder import open_folder
from fewbits.checkpoint.job import Job, split
from fewbits.checkpoint.safetensors import CheckpointError
from fewbits.checkpoint.session import session
from fewbits.checkpoint.work import run
from fewbits.integrations import architecture, streaming

from .conftest import KINDS

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Same = Callable[[Path, Path], None]

CONFIGS: dict[str, Any] = {
    "nf4_dq": fewbits.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    ),
    "fp4_in_bf16": fewbits.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "int8": fewbits.BitsAndBytesConfig(load_in_8bit=True),
    "int4": fewbits.FewbitsConfig("int4:g16:f16:zero"),
    "everything": fewbits.FewbitsConfig(
        "nf4:g64:dq",
        modules={
            "lm_head": "int8",
            "embed_tokens": "int8",
            "shared": "int8",
            "wte": "int8",
            "k_proj": "skip",
            "layers.0.mlp": "int3:g16",
        },
    ),
    "nothing_but_one": fewbits.FewbitsConfig("skip", modules={"layers.1.self_attn.q_proj": "mxfp4"}),
}


def stream(
    source: Path, out: Path, config: Any, *, max_bytes: int = 5 * 10**9, threads: int = 2
) -> streaming.Plan:
    folder = open_folder(source)
    plan = streaming.plan(folder, config)
    shards = split(plan.units, max_bytes)
    identity = {
        "shards": [[shard.name, shard.size] for shard in shards],
        "weights": [],
        "carried": {},
        "source_bytes": 1,
        "parameters": 0,
        "card": {},
        "base_model": "x",
        "name": "y",
        "method": "z",
        "command": "",
        "architecture": "A",
        "versions": {"fewbits": "0"},
    }
    job = Job(folder, out, shards, identity, {"config.json": json.dumps(plan.config)}, {})
    with session(job, "all", join=False):
        run(job, shards, threads=threads, memory=2**20, advance=lambda _: None)
        finish(out, overwrite=False)
    return plan


def on_the_fly(source: Path, out: Path, config: Any, load: Load) -> Any:
    model = load(source, config)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_bytes_of_loading_on_the_fly(
    kind: str, name: str, checkpoint: Checkpoint, load: Load, same_tensors: Same, tmp_path: Path
) -> None:
    source = checkpoint(kind, torch.bfloat16)
    try:
        model = on_the_fly(source, tmp_path / "fly", CONFIGS[name], load)
    except ValueError as refused:  # a config that does not fit the model is refused by both
        with pytest.raises(ValueError, match=str(refused)[-20:].replace("[", r"\[").replace("(", r"\(")):
            stream(source, tmp_path / "out", CONFIGS[name])
        return
    plan = stream(source, tmp_path / "out", CONFIGS[name])
    same_tensors(tmp_path / "fly", tmp_path / "out")
    loaded = fewbits.report(model).entries
    assert [(entry.name, entry.stored, entry.nbytes, entry.reason) for entry in plan.report.entries] == [
        (entry.name, entry.stored, entry.nbytes, entry.reason) for entry in loaded
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "t5"])
@pytest.mark.parametrize("name", ["nf4_dq", "everything"])
def test_the_result_loads_and_computes_the_same(
    kind: str, name: str, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
) -> None:
    source = checkpoint(kind, torch.bfloat16)
    stream(source, tmp_path / "out", CONFIGS[name])
    expected = run(load(source, CONFIGS[name]))
    again = load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert run(again).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "t5"])
def test_other_dtypes(
    kind: str, dtype: torch.dtype, checkpoint: Checkpoint, load: Load, same_tensors: Same, tmp_path: Path
) -> None:
    """T5 keeps some layers in float32 when the rest is float16."""
    source = checkpoint(kind, dtype)
    model = on_the_fly(source, tmp_path / "fly", CONFIGS["int4"], load)
    plan = stream(source, tmp_path / "out", CONFIGS["int4"])
    same_tensors(tmp_path / "fly", tmp_path / "out")
    assert [(entry.name, entry.stored, entry.nbytes) for entry in plan.report.entries] == [
        (entry.name, entry.stored, entry.nbytes) for entry in fewbits.report(model).entries
    ]


def test_weights_are_cast_to_the_dtype_of_the_config_first(
    checkpoint: Checkpoint, load: Load, same_tensors: Same, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("llama", torch.float32), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    on_the_fly(source, tmp_path / "fly", CONFIGS["nf4_dq"], load)
    stream(source, tmp_path / "out", CONFIGS["nf4_dq"])
    same_tensors(tmp_path / "fly", tmp_path / "out")


def test_without_a_dtype_in_the_config_that_of_the_weights_holds(
    checkpoint: Checkpoint, load: Load, same_tensors: Same, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("llama", torch.float16), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    on_the_fly(source, tmp_path / "fly", CONFIGS["int8"], load)
    plan = stream(source, tmp_path / "out", CONFIGS["int8"])
    assert plan.config["dtype"] == "float16"
    same_tensors(tmp_path / "fly", tmp_path / "out")


def test_a_single_file_equals_that_of_save_pretrained(
    checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    on_the_fly(source, tmp_path / "fly", CONFIGS["int4"], load)
    stream(source, tmp_path / "out", CONFIGS["int4"])
    one, other = (tmp_path / folder / "model.safetensors" for folder in ("fly", "out"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["nf4_dq", "int4"])
def test_shards_in_and_out(
    name: str, checkpoint: Checkpoint, load: Load, run: Run, same_tensors: Same, tmp_path: Path
) -> None:
    plain = load(checkpoint("mixtral", torch.bfloat16))
    plain.save_pretrained(tmp_path / "source", max_shard_size="40kB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    on_the_fly(tmp_path / "source", tmp_path / "fly", CONFIGS[name], load)
    stream(tmp_path / "source", tmp_path / "out", CONFIGS[name], max_bytes=20_000, threads=1)
    stream(tmp_path / "source", tmp_path / "again", CONFIGS[name], max_bytes=20_000, threads=3)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    same_tensors(tmp_path / "fly", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {tensor: file.name for file in files for tensor in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(file).values()
    )
    assert run(load(tmp_path / "out")).equal(run(load(tmp_path / "fly")))


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def plan(source: Path) -> streaming.Plan:
    return streaming.plan(open_folder(source), CONFIGS["nf4_dq"])


class TestRefused:
    def test_a_missing_tensor(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        source = changed(checkpoint("llama"), tmp_path / "x", lambda tensors: tensors.pop(name))
        with pytest.raises(CheckpointError, match=rf"{name} of LlamaForCausalLM is missing"):
            plan(source)

    def test_a_missing_expert(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        def drop(tensors: dict[str, Tensor]) -> None:
            tensors.pop(next(name for name in tensors if "experts.2" in name))

        with pytest.raises(CheckpointError, match="experts"):
            plan(changed(checkpoint("mixtral"), tmp_path / "x", drop))

    def test_an_unexpected_tensor(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.0.extra.weight"] = torch.zeros(2, 2)

        with pytest.raises(CheckpointError, match=r"extra\.weight: LlamaForCausalLM has no such tensor"):
            plan(changed(checkpoint("llama"), tmp_path / "x", add))

    def test_old_rotary_buffers_are_passed_over(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

        found = plan(changed(checkpoint("llama"), tmp_path / "x", add))
        assert not any("inv_freq" in name for unit in found.units for name in unit.sources)

    def test_another_shape(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        source = with_config(checkpoint("llama"), tmp_path / "x", intermediate_size=96)
        with pytest.raises(CheckpointError, match=r"\[64, 80\], but config.json says \[64, 96\]"):
            plan(source)

    def test_a_quantized_checkpoint(self, checkpoint: Checkpoint, load: Load, tmp_path: Path) -> None:
        load(checkpoint("llama"), CONFIGS["int8"]).save_pretrained(tmp_path / "x")
        with pytest.raises(CheckpointError, match=r"quantized already \(bitsandbytes\)"):
            plan(tmp_path / "x")

    def test_tied_weights_with_different_values(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

        with pytest.raises(CheckpointError, match=r"different values.*tie_word_embeddings"):
            plan(changed(checkpoint("llama_tied"), tmp_path / "x", add))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["os"]}, "architecture 'os'"),
            ({"architectures": ["LlamaConfig"]}, "architecture 'LlamaConfig'"),
            ({"architectures": ["EvilForCausalLM"], "auto_map": {"AutoModel": "evil.Evil"}}, "never run"),
            ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "never run"),
            ({"hidden_size": "64"}, "does not describe a llama model"),
            ({"hidden_size": 2**70}, "does not describe a llama model"),
            ({"num_hidden_layers": 3}, "is missing"),
        ],
    )
    def test_a_config_of_something_else(
        self, changes: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            plan(with_config(checkpoint("llama"), tmp_path / "x", **changes))


@pytest.mark.parametrize("both", [False, True])
def test_tied_weights_are_stored_once_whichever_name_they_have(
    both: bool, checkpoint: Checkpoint, load: Load, same_tensors: Same, tmp_path: Path
) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not both:
            del tensors["model.embed_tokens.weight"]

    source = changed(checkpoint("llama_tied", torch.bfloat16), tmp_path / "x", rename)
    on_the_fly(source, tmp_path / "fly", CONFIGS["int4"], load)
    stream(source, tmp_path / "out", CONFIGS["int4"])
    same_tensors(tmp_path / "fly", tmp_path / "out")


def saved_tiny(name: str, settings: dict[str, Any], folder: Path) -> Path:
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mamba2", {**_SMALL, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "expand": 2}),
        ("Gemma2", {**_SMALL, "num_key_value_heads": 2, "head_dim": 16}),
        ("Phi", _SMALL),
        ("GPTNeoX", _SMALL),
        ("Olmo2", _SMALL),
    ],
)
def test_further_architectures(
    name: str, settings: dict[str, Any], load: Load, same_tensors: Same, tmp_path: Path
) -> None:
    """Mamba2 has an infinite number in its config, which JSON files spell in a way of their own."""
    source = saved_tiny(name, settings, tmp_path / "source")
    on_the_fly(source, tmp_path / "fly", CONFIGS["int4"], load)
    stream(source, tmp_path / "out", CONFIGS["int4"])
    same_tensors(tmp_path / "fly", tmp_path / "out")


def test_vision_language_mixtures(load: Load, same_tensors: Same, tmp_path: Path) -> None:
    text = {
        **_SMALL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(3)
    model = transformers.Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    for name in ("int4", "nf4_dq"):
        on_the_fly(tmp_path / "source", tmp_path / f"fly-{name}", CONFIGS[name], load)
        stream(tmp_path / "source", tmp_path / f"out-{name}", CONFIGS[name])
        same_tensors(tmp_path / f"fly-{name}", tmp_path / f"out-{name}")


def test_what_a_hostile_config_asks_for_is_left_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"something was fetched: {arguments}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    hostile = {
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "_experts_implementation": "evil/kernel",
        "use_kernels": True,
        "auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"},
    }
    source = with_config(checkpoint("llama"), tmp_path / "x", **hostile)
    found = plan(source)
    assert not set(hostile) & set(found.config)
    stream(source, tmp_path / "out", CONFIGS["nf4_dq"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config._attn_implementation in ("sdpa", "eager")


_FUSED = {
    "NomicBert": ("NomicBertForMaskedLM", {"type_vocab_size": 2, "max_position_embeddings": 64}),
    "JinaEmbeddingsV3": (
        "JinaEmbeddingsV3ForMaskedLM",
        {"type_vocab_size": 1, "max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("options", ["nf4_dq", "int4", "int8"])
@pytest.mark.parametrize("name", _FUSED)
def test_what_is_fused_in_files_is_stored_layer_by_layer(
    name: str, options: str, load: Load, run: Run, same_tensors: Same, tmp_path: Path
) -> None:
    """Their files hold q, k and v in one tensor, which codes cannot be put together to."""
    model_class, settings = _FUSED[name]
    config = getattr(transformers, f"{name}Config")(**_SMALL, **settings)
    torch.manual_seed(3)
    model = getattr(transformers, model_class)._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    assert any("Wqkv" in key for key in load_file(tmp_path / "source" / "model.safetensors"))
    fly = on_the_fly(tmp_path / "source", tmp_path / "fly", CONFIGS[options], load)
    assert len(fewbits.report(fly).quantized) >= 6
    stream(tmp_path / "source", tmp_path / "out", CONFIGS[options])
    same_tensors(tmp_path / "fly", tmp_path / "out")
    assert run(load(tmp_path / "out")).equal(run(fly))


def test_experts_are_made_one_by_one(checkpoint: Checkpoint) -> None:
    """So that memory depends on an expert, not on all experts of a layer."""
    found = streaming.plan(open_folder(checkpoint("mixtral", torch.bfloat16)), CONFIGS["int4"])
    pieces = [unit for unit in found.units if unit.piece[1] > 1]
    assert [unit.piece for unit in pieces[:5]] == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 4)]
    assert len(pieces) == 2 * 2 * 4
    assert sorted(pieces[1].sources) == [
        "model.layers.0.block_sparse_moe.experts.1.w1.weight",
        "model.layers.0.block_sparse_moe.experts.1.w3.weight",
    ]
    assert found.largest == 2 * 80 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**5}, "100000 for num_hidden_layers, which no model has"),
        ({"num_labels": 10**8}, "100000000 for num_labels, which no model has"),
        ({"attention_types": [[["global"], 10**9]]}, "which no model has"),
        ({"architectures": ["LlamaPreTrainedModel"]}, "has no weights"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"architectures": ["PreTrainedModel"]}, "architecture 'PreTrainedModel'"),
    ],
)
def test_a_config_that_would_take_all_memory_or_means_nothing(
    changes: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(with_config(checkpoint("llama"), tmp_path / "x", **changes))


def test_what_other_packages_would_load_is_refused_or_left_out(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    inner = {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "evil.pth"}}
    with pytest.raises(ValueError, match="timm package"):
        plan(with_config(checkpoint("llama"), tmp_path / "x", vision_config=inner))
    options = {"extra": [{"checkpoint_path": "evil.pth", "kept": 1}], "backbone_kwargs": {"a": 1}}
    found = plan(with_config(checkpoint("llama"), tmp_path / "y", **options))
    assert found.config["extra"] == [{"kept": 1}]
    assert "backbone_kwargs" not in found.config


def test_a_config_of_too_many_modules() -> None:
    with pytest.raises(ValueError, match="more than 3 modules"), architecture._at_most(3):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(4)))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(4)))


def test_facts_beside_the_model_are_nobodys_business(checkpoint: Checkpoint, tmp_path: Path) -> None:
    facts = {"num_parameters": 7 * 10**9, "num_training_tokens": 10**13}
    assert (
        plan(with_config(checkpoint("llama"), tmp_path / "x", **facts)).config["num_parameters"] == 7 * 10**9
    )


def test_a_config_nested_without_end(checkpoint: Checkpoint, tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"a": nested}
    with pytest.raises(ValueError, match="nested deeper"):
        plan(with_config(checkpoint("llama"), tmp_path / "x", extra=nested))


def test_float64(checkpoint: Checkpoint, load: Load, same_tensors: Same, tmp_path: Path) -> None:
    source = with_config(checkpoint("llama", torch.float32), tmp_path / "x", dtype="float64")
    on_the_fly(source, tmp_path / "fly", CONFIGS["int4"], load)
    stream(source, tmp_path / "out", CONFIGS["int4"])
    same_tensors(tmp_path / "fly", tmp_path / "out")

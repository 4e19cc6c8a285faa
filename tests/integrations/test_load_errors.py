"""What cannot be loaded says which tensor, what is wrong with it, and what to do."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

import fewbits

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Tensors = Callable[[Path], dict[str, Tensor]]

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def damaged(tensors_of: Tensors, tmp_path: Path) -> Callable[..., Path]:
    """damaged(folder, change): a copy whose tensors `change` has edited in place."""

    def copy(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
        target = tmp_path / "damaged"
        shutil.copytree(folder, target)
        tensors = tensors_of(folder)
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return copy


class TestBadWeights:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize(
        "config", [NF4, INT8, fewbits.FewbitsConfig("mxfp4")], ids=["nf4", "int8", "own"]
    )
    def test_not_finite(
        self,
        bad: float,
        config: Any,
        checkpoint: Checkpoint,
        load: Load,
        damaged: Callable[..., Path],
    ) -> None:
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors[f"{LAYER}.weight"][3, 5] = bad

        path = damaged(checkpoint("llama", torch.bfloat16), spoil)
        with pytest.raises((ValueError, RuntimeError)) as raised:
            load(path, config)
        assert f"{LAYER}.weight" in str(raised.value), "the raised error itself must name the tensor"
        assert "NaN" in str(raised.value) or "inf" in str(raised.value).lower()

    def test_not_finite_in_one_expert(
        self, checkpoint: Checkpoint, load: Load, damaged: Callable[..., Path]
    ) -> None:
        def spoil(tensors: dict[str, Tensor]) -> None:
            name = next(name for name in sorted(tensors) if "layers.1" in name and ".experts." in name)
            tensors[name].view(-1)[7] = math.nan

        path = damaged(checkpoint("qwen3_moe"), spoil)
        with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.1\.mlp\.experts\.\w+_proj"):
            load(path, NF4)

    def test_kept_weights_may_hold_anything(
        self, checkpoint: Checkpoint, load: Load, damaged: Callable[..., Path]
    ) -> None:
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"][0, 0] = math.nan

        model = load(damaged(checkpoint("llama"), spoil), NF4)
        assert model.lm_head.weight[0, 0].isnan()

    def test_in_place(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        model.get_parameter(f"{LAYER}.weight").data[0, 0] = math.nan
        with pytest.raises(ValueError, match=rf"{LAYER}\.weight.*NaN"):
            fewbits.quantize_model(model, "nf4:g64")

    def test_storage_that_does_not_divide_the_codes(self, checkpoint: Checkpoint, load: Load) -> None:
        sizes = {"hidden_size": 20, "intermediate_size": 30, "num_attention_heads": 2}
        path = checkpoint("llama", **sizes, num_key_value_heads=1)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float64")
        with pytest.raises(ValueError, match=r"100 bytes.*float64.*uint8"):
            load(path, config)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_file_that_is_cut_off_is_named(
    kept: float, quantized: bool, checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    folder = tmp_path / "cut"
    if quantized:
        load(source, NF4).save_pretrained(folder)
    else:
        shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(size * kept) if kept == 0.5 else size - 1 if kept == -1 else int(kept))
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        load(folder, *([] if quantized else [NF4]))


class TestBadFiles:
    """Damaged or foreign quantized checkpoints."""

    @pytest.fixture
    def saved(self, checkpoint: Checkpoint, load: Load, tmp_path: Path) -> Callable[[Any], Path]:
        def save(config: Any) -> Path:
            load(checkpoint("llama", torch.bfloat16), config).save_pretrained(tmp_path / "saved")
            return tmp_path / "saved"

        return save

    @pytest.mark.parametrize(
        ("config", "key"),
        [
            (NF4, "weight.absmax"),
            (NF4, "weight.nested_absmax"),
            (NF4, "weight.quant_state.bitsandbytes__nf4"),
            (NF4, "weight"),
            (INT8, "SCB"),
            (INT8, "weight"),
        ],
    )
    def test_a_missing_tensor(
        self,
        config: Any,
        key: str,
        saved: Callable[[Any], Path],
        load: Load,
        damaged: Callable[..., Path],
    ) -> None:
        path = damaged(saved(config), lambda tensors: tensors.pop(f"{LAYER}.{key}"))
        with pytest.raises((ValueError, RuntimeError)) as raised:
            load(path)
        assert LAYER in str(raised.value), "the raised error itself must name the layer"

    @pytest.mark.parametrize(
        "key", ["weight", "weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"]
    )
    def test_a_truncated_tensor(
        self, key: str, saved: Callable[[Any], Path], load: Load, damaged: Callable[..., Path]
    ) -> None:
        def cut(tensors: dict[str, Tensor]) -> None:
            name = f"{LAYER}.{key}"
            tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()

        with pytest.raises((ValueError, RuntimeError)) as raised:
            load(damaged(saved(NF4), cut))
        assert LAYER in str(raised.value), "the raised error itself must name the layer"

    def test_another_codebook(
        self, saved: Callable[[Any], Path], load: Load, damaged: Callable[..., Path]
    ) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors[f"{LAYER}.weight.quant_map"][3] += 0.1

        with pytest.raises((ValueError, RuntimeError), match=rf"{LAYER}.*quant_map"):
            load(damaged(saved(NF4), change))

    @pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
    def test_a_checkpoint_of_other_sizes(
        self, config: Any, saved: Callable[[Any], Path], load: Load, tmp_path: Path
    ) -> None:
        path = saved(config)
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**settings, "intermediate_size": 96}))
        with pytest.raises((ValueError, RuntimeError)) as raised:
            load(path)
        assert "model.layers.0.mlp." in str(raised.value)
        assert "80" in str(raised.value)
        assert "96" in str(raised.value)

    @pytest.mark.parametrize("part", ["weight", "weight_scale"])
    def test_an_own_checkpoint_that_is_not_whole(
        self, part: str, saved: Callable[[Any], Path], load: Load, damaged: Callable[..., Path]
    ) -> None:
        own = fewbits.FewbitsConfig("int4:g16:zero")
        path = damaged(saved(own), lambda tensors: tensors.pop(f"{LAYER}.{part}"))
        with pytest.raises((ValueError, RuntimeError)) as raised:
            load(path)
        assert LAYER in str(raised.value)

    def test_an_own_checkpoint_of_other_sizes(self, saved: Callable[[Any], Path], load: Load) -> None:
        path = saved(fewbits.FewbitsConfig("int4:g16:zero"))
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**settings, "intermediate_size": 96}))
        with pytest.raises((ValueError, RuntimeError), match=r"proj.weight is stored as"):
            load(path)

    def test_a_newer_version(self, saved: Callable[[Any], Path], load: Load) -> None:
        path = saved(fewbits.FewbitsConfig("int4:g16:zero"))
        settings = json.loads((path / "config.json").read_text())
        settings["quantization_config"]["version"] = 99
        (path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"version 99.*Upgrade fewbits"):
            load(path)


class TestBadOptions:
    def test_neither_4_nor_8_bits(self, checkpoint: Checkpoint, load: Load) -> None:
        for cls in (BitsAndBytesConfig, fewbits.BitsAndBytesConfig):
            with pytest.raises(ValueError, match="load_in_4bit"):
                load(checkpoint("llama"), cls())

    def test_an_unknown_quant_type(self, checkpoint: Checkpoint, load: Load) -> None:
        """transformers' class takes any string."""
        with pytest.raises(ValueError, match=r"nf4.*fp4.*nf5"):
            load(checkpoint("llama"), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf5"))

    def test_a_mistyped_format(self) -> None:
        with pytest.raises(ValueError, match=r"nf44.*nf4"):
            fewbits.FewbitsConfig("nf44:g64")

    def test_quantizing_twice(self, checkpoint: Checkpoint, load: Load, run: Run) -> None:
        model = load(checkpoint("llama"), NF4)
        before = run(model)
        report = fewbits.quantize_model(model, "int8:row")
        assert run(model).equal(before)
        assert {entry.stored for entry in report.quantized} == {"nf4:g64:dq"}


def test_an_architecture_that_the_checkpoint_does_not_fit(checkpoint: Checkpoint) -> None:
    """As in transformers, all is new then; nothing passes for quantized, and every layer says why."""
    model = transformers.GPT2LMHeadModel.from_pretrained(
        checkpoint("llama"),
        config=transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4),
        quantization_config=NF4,
    )
    report = fewbits.report(model)
    assert not report.quantized
    new = [entry.name for entry in report.kept if entry.reason == "not in the checkpoint: new and random"]
    assert len(new) == 8
    assert all(parameter.isfinite().all() for parameter in model.parameters())

"""Device maps: none, automatic, the CPU, and layers that stay on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]

ON_CPU = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
CONFIGS: dict[str, Any] = {
    "nf4_dq": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4_in_bf16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int4": fewbits.FewbitsConfig("int4:g16:zero"),
}
BITSANDBYTES = [config for config in CONFIGS.values() if isinstance(config, BitsAndBytesConfig)]
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@by_config
@pytest.mark.parametrize(
    "device_map",
    [None, "auto", "balanced", "sequential", "cpu", {"": "cpu"}, {"": torch.device("cpu")}, ON_CPU],
    ids=str,
)
def test_every_map_to_the_cpu_gives_the_same(
    device_map: Any,
    config: Any,
    checkpoint: Checkpoint,
    load: Load,
    run: Run,
    quantized: Layers,
    tmp_path: Path,
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("None and auto go to the accelerator of this machine")
    path = checkpoint("llama", torch.bfloat16)
    wanted = load(path, config)
    wanted.save_pretrained(tmp_path)
    for folder, given in ((path, config), (tmp_path, None)):
        model = load(folder, given, device_map=device_map)
        assert len(quantized(model)) == 14
        assert run(model).equal(run(wanted))
        assert model.get_memory_footprint() == wanted.get_memory_footprint()
        assert {str(parameter.device) for parameter in model.parameters()} == {"cpu"}


@by_config
def test_a_quantized_checkpoint_runs_from_the_disk(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    wanted = load(checkpoint("llama", torch.bfloat16), config)
    wanted.save_pretrained(tmp_path / "saved")
    for layers in (ON_DISK, {**ON_DISK, "model.layers.0": "disk", "lm_head": "disk"}):
        model = load(tmp_path / "saved", device_map=layers, offload_folder=tmp_path / "offloaded")
        away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        assert any(name.startswith("model.layers.1") for name in away)
        assert not any(name.startswith("model.embed_tokens") for name in away)
        assert len(quantized(model)) == 14
        for _ in range(2):
            assert run(model).equal(run(wanted))
        tokens = torch.tensor([[3, 14, 15]])
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert model.generate(tokens, **settings).equal(wanted.generate(tokens, **settings))


@by_config
def test_a_model_on_the_disk_saves_exactly(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run, same_tensors: Same, tmp_path: Path
) -> None:
    load(checkpoint("llama", torch.bfloat16), config).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", device_map=ON_DISK, offload_folder=tmp_path / "offloaded")
    model.save_pretrained(tmp_path / "again")
    same_tensors(tmp_path / "saved", tmp_path / "again")
    assert run(load(tmp_path / "again")).equal(run(model))


@by_config
@pytest.mark.parametrize("cls", [dict, fewbits.FewbitsConfig], ids=["asked", "own"])
def test_quantizing_on_the_fly_onto_the_disk_is_refused_with_the_way_out(
    cls: Any, config: Any, checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    given = config if cls is dict else cls("nf4:g64")
    with pytest.raises(ValueError, match="disk") as raised:
        load(checkpoint("llama"), given, device_map=ON_DISK, offload_folder=tmp_path)
    assert "save_pretrained" in str(raised.value)
    assert "device_map='cpu'" in str(raised.value)


@by_config
def test_a_model_on_the_disk_is_not_dequantized_silently(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    load(checkpoint("llama"), config).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", device_map=ON_DISK, offload_folder=tmp_path / "offloaded")
    before = run(model)
    with pytest.raises(ValueError, match="offloaded"):
        model.dequantize()
    assert len(quantized(model)) == 14
    assert run(model).equal(before)


@pytest.mark.parametrize("config", BITSANDBYTES, ids=["nf4_dq", "fp4_in_bf16", "int8"])
@pytest.mark.parametrize(
    ("device_map", "count"),
    [
        ({"": 0}, 14),
        ({"model": 0, "lm_head": 0}, 14),
        ({**ON_DISK, "model.layers.0": 0, "model.layers.1": "cpu"}, 7),
        (ON_CPU, 14),
    ],
    ids=["accelerator", "by_name", "mixed", "cpu"],
)
def test_layers_sent_to_the_cpu_stay_plain_with_fp32_offload(
    device_map: dict[str, Any], count: int, config: Any, quantized: Layers
) -> None:
    """On the meta device, for maps to an accelerator that need not be there; nothing is computed."""
    settings = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    options = {**config.to_dict(), "llm_int8_enable_fp32_cpu_offload": True}
    quantizer = FewbitsQuantizer(BitsAndBytesConfig.from_dict(options), pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=device_map)
    assert len(quantized(model)) == count
    if count == 7:
        assert not any("layers.1" in name for name in quantized(model))
        reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        assert "fp32_cpu_offload" in reasons["model.layers.1.mlp.up_proj.weight"]

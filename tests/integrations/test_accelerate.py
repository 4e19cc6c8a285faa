"""accelerate beside fewbits: planned sizes are the stored ones, models move, and Accelerator takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate as maps
import transformers.modeling_utils
from accelerate import Accelerator, infer_auto_device_map
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import compute_module_sizes, get_balanced_memory
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.config import FewbitsConfig
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
NewModel = Callable[..., Any]
Run = Callable[..., Tensor]

FORMATS = (
    "nf4:g64",
    "nf4:g64:dq",
    "int4:g16:f16:zero",
    "int3:g32",
    "int2:g16:zero",
    "int8:row@int8:t6",
    "fp8_e4m3:b128x128",
    "mxfp4",
    "nvfp4",
)
CONFIGS: dict[str, Any] = {
    **{
        f"bitsandbytes_{storage}": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage
        )
        for storage in ("uint8", "bfloat16", "float32")
    },
    "bitsandbytes_8bit": BitsAndBytesConfig(load_in_8bit=True),
    **{
        f"{format}{'_embeddings' if embeddings else ''}": FewbitsConfig(
            format, {"embed_tokens": format} if embeddings else None
        )
        for format in FORMATS
        for embeddings in (False, True)
    },
}


def _modules(model: nn.Module) -> dict[str, int]:
    """Stored bytes of every module, with all in it; tied tensors count once, at their first name."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            parts = name.split(".")
            for depth in range(len(parts)):
                path = ".".join(parts[:depth])
                sizes[path] = sizes.get(path, 0) + tensor.nbytes
    return sizes


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_planned_sizes_are_the_stored_ones(
    config: Any, checkpoint: Checkpoint, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned: list[dict[str, float]] = []
    infer = maps._get_device_map

    def spy(model: Any, device_map: Any, max_memory: Any, quantizer: Any) -> Any:
        planned.append(dict(maps.compute_module_sizes(model, quantizer)[0]))
        return infer(model, device_map, max_memory, quantizer)

    monkeypatch.setattr(transformers.modeling_utils, "_get_device_map", spy)
    for kind in ("llama_tied", "mixtral"):
        if kind == "mixtral" and getattr(config, "bnb_4bit_quant_storage", torch.uint8) != torch.uint8:
            continue
        planned.clear()
        model = load(checkpoint(kind, torch.bfloat16), config, device_map="cpu")
        model.save_pretrained(tmp_path / kind)
        load(tmp_path / kind, device_map="cpu")
        stored = _modules(model)
        assert stored[""] == model.get_memory_footprint()
        for sizes in planned:
            # transformers counts a tied weight at its source, which comes second here
            for tied in ("lm_head", "model.embed_tokens", "model"):
                sizes.pop(tied, None)
            assert sizes == {name: stored[name] for name in sizes}
            assert sizes.keys() >= {"", "model.layers", "model.layers.1"}
        assert len(planned) == 2


@pytest.mark.parametrize("config", [CONFIGS["bitsandbytes_uint8"], CONFIGS["int4:g16:f16:zero"]])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mixtral"])
def test_an_inferred_map_stays_below_max_memory(
    kind: str, config: Any, checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    load(checkpoint(kind, torch.bfloat16, num_hidden_layers=6), config).save_pretrained(tmp_path / "saved")
    whole = load(tmp_path / "saved").get_memory_footprint()
    for share in (0.6, 0.8, 1.0):
        limit = int(whole * share)
        model = load(
            tmp_path / "saved",
            device_map="auto",
            max_memory={"cpu": limit},
            offload_folder=tmp_path / f"away{share}",
        )
        held = sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta)
        assert held < limit
        if share < 1:
            assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        layers = [name for name in model.hf_device_map if name.startswith("model.layers.")]
        assert all(name.count(".") == 2 for name in layers)  # decoder layers are not split


@pytest.mark.parametrize("format", FORMATS)
def test_accelerate_counts_stored_bytes(format: str, new_model: NewModel) -> None:
    model = new_model("llama_bias").to(torch.bfloat16)
    fewbits.quantize_model(model, format)
    stored, found = _modules(model), compute_module_sizes(model)
    assert {name: found[name] for name in stored} == stored
    limits = {0: int(stored[""] * 0.8), 1: stored[""], "cpu": 10**6}
    places = infer_auto_device_map(model, dict(limits), no_split_module_classes=["LlamaDecoderLayer"])
    assert len(set(places.values())) > 1
    for place in limits:
        assert sum(stored.get(name, 0) for name, where in places.items() if where == place) <= limits[place]
    assert not any(name.startswith("model.layers.0.") for name in places)
    balanced = get_balanced_memory(model, {0: 10**6, 1: 10**6}, no_split_module_classes=["LlamaDecoderLayer"])
    assert balanced[0] < stored[""]


# --- moving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("format", FORMATS)
def test_to_the_meta_device_and_back(format: str, storage: str, run: Run, new_model: NewModel) -> None:
    model = new_model("llama_bias").to(torch.bfloat16)
    entry = {"format": format, "storage_dtype": storage}
    try:
        fewbits.quantize_model(model, FewbitsConfig(entry))
    except ValueError:
        pytest.skip(f"codes of some layer do not fill whole elements of {storage}")
    wanted, state = run(model), model.state_dict()
    assert model.to("cpu").cpu() is model
    assert run(model).equal(wanted)
    rotary = copy.deepcopy(model.model.rotary_emb)
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.parameters())
    assert model.state_dict().keys() == state.keys()
    model.to_empty(device="cpu").load_state_dict(state)
    model.model.rotary_emb = rotary  # not in a state dict
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
    assert run(model).equal(wanted)


@pytest.mark.parametrize("config", [CONFIGS["bitsandbytes_uint8"], CONFIGS["bitsandbytes_8bit"]])
def test_a_bitsandbytes_model_moves_but_is_not_cast(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run
) -> None:
    model = load(checkpoint("llama", torch.bfloat16), config, device_map="cpu")
    wanted = run(model)
    assert run(model.to("cpu").cpu()).equal(wanted)
    assert run(model.to(device=torch.device("cpu"))).equal(wanted)
    with pytest.raises(ValueError, match="dtype"):
        model.to(torch.float16)
    with pytest.raises(ValueError, match="half"):
        model.half()
    assert all(tensor.is_meta for tensor in model.to("meta").parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_between_the_cpu_and_an_accelerator(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run
) -> None:
    model = load(checkpoint("llama_tied", torch.bfloat16), config, device_map="cpu")
    wanted, state = run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.cuda()
    assert {tensor.device.type for tensor in model.parameters()} == {"cuda"}
    ids = torch.arange(24, device="cuda").reshape(2, 12) * 7 % 94 + 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.cpu(), wanted, atol=0.2, rtol=0.2)
    model.cpu()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert run(model).equal(wanted)


# --- Accelerator ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget_accelerators() -> Any:
    """Its state is global to the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


PREPARED = {
    "bitsandbytes": CONFIGS["bitsandbytes_uint8"],
    "8bit": CONFIGS["bitsandbytes_8bit"],
    "own": CONFIGS["int4:g16:f16:zero"],
}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("config", PREPARED.values(), ids=PREPARED)
def test_accelerator_prepares_and_trains_adapters(
    config: Any, precision: str, checkpoint: Checkpoint, load: Load
) -> None:
    base = load(checkpoint("llama", torch.bfloat16), config, device_map="cpu")
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(3, 7)]
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    unwrapped = accelerator.unwrap_model(prepared)
    assert unwrapped is model
    for name, layer in unwrapped.base_model.model.named_modules():
        if isinstance(layer, QuantModule):
            plain = name.replace(".base_layer", "")
            for part, tensor in layer.state_dict().items():
                assert tensor.equal(frozen[f"{plain}.{part}"])


@pytest.mark.parametrize("config", PREPARED.values(), ids=PREPARED)
def test_accelerator_takes_a_dispatched_model(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
) -> None:
    load(checkpoint("llama", torch.bfloat16), config).save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "away")
    wanted = run(model)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert prepared.hf_device_map == places
    assert run(prepared).equal(wanted)


@pytest.mark.parametrize("config", PREPARED.values(), ids=PREPARED)
@pytest.mark.parametrize("offloaded", [False, True], ids=["here", "disk"])
def test_accelerator_saves_all_parts(
    offloaded: bool, config: Any, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
) -> None:
    model = load(checkpoint("llama", torch.bfloat16), config, device_map="cpu")
    state, wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}, run(model)
    if offloaded:
        model.save_pretrained(tmp_path / "saved")
        model = load(tmp_path / "saved", device_map={"": "disk"}, offload_folder=tmp_path / "away")
    accelerator = Accelerator(cpu=True)
    if not offloaded:
        gathered = accelerator.get_state_dict(accelerator.prepare(model))
        assert all(tensor.equal(state[name]) for name, tensor in gathered.items())
        assert gathered.keys() == state.keys()
    accelerator.save_model(model, tmp_path / "parts")
    parts = load_file(tmp_path / "parts" / "model.safetensors")
    assert parts.keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in parts.items())
    other = load(checkpoint("llama", torch.bfloat16), config, device_map="cpu")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(parts)
    assert run(other).equal(wanted)

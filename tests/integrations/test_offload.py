"""Layers that accelerate offloads, and layers on the CPU beside an accelerator, compute what they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.config import FewbitsConfig
from fewbits.integrations import placement
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
NewModel = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]

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
OFFLOADS: dict[str, Callable[[nn.Module, Path, bool], Any]] = {
    "cpu": lambda model, folder, buffers: cpu_offload(model, "cpu", offload_buffers=buffers),
    "disk": lambda model, folder, buffers: disk_offload(model, folder, "cpu", offload_buffers=buffers),
    "dispatch": lambda model, folder, buffers: dispatch_model(
        model, _second_layer_on_the_disk(model), offload_dir=folder, offload_buffers=buffers
    ),
}
by_offload = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
by_buffers = pytest.mark.parametrize("buffers", [False, True], ids=["buffers_stay", "buffers_too"])


def _second_layer_on_the_disk(model: Any) -> dict[str, str]:
    prefix = model.base_model_prefix
    places = {}
    for name, module in getattr(model, prefix).named_children():
        if isinstance(module, nn.ModuleList):
            places |= {f"{prefix}.{name}.{i}": "disk" if i else "cpu" for i in range(len(module))}
        else:
            places[f"{prefix}.{name}"] = "cpu"
    return {**places, "lm_head": "cpu"}


def _quantized_model(new_model: NewModel, kind: str, format: str, embeddings: bool = False) -> Any:
    model = new_model(kind).to(torch.bfloat16)
    fewbits.quantize_model(model, FewbitsConfig(format, {"embed_tokens": format} if embeddings else None))
    return model


# --- accelerate's hooks -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_an_offloaded_model_computes_the_same(
    format: str, new_model: NewModel, run: Run, tmp_path: Path
) -> None:
    model = _quantized_model(new_model, "llama_bias", format)
    wanted = run(model)
    OFFLOADS["dispatch"](model, tmp_path, False)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    for _ in range(2):
        assert run(model).equal(wanted)


@by_offload
@by_buffers
@pytest.mark.parametrize("kind", ["llama_tied", "mixtral", "gpt_oss"])
def test_tied_embeddings_and_experts_offload(
    kind: str, buffers: bool, offload: Any, new_model: NewModel, run: Run, tmp_path: Path
) -> None:
    model = _quantized_model(new_model, kind, "int4:g16:zero", embeddings=True)
    wanted = run(model)
    offload(model, tmp_path, buffers)
    for _ in range(2):
        assert run(model).equal(wanted)


@pytest.mark.parametrize("name", ["cpu", "disk"])
@by_buffers
def test_removing_the_hooks_brings_everything_back(
    buffers: bool, name: str, new_model: NewModel, run: Run, tmp_path: Path
) -> None:
    model = _quantized_model(new_model, "llama", "nf4:g64:dq")
    before, wanted = {key: value.clone() for key, value in model.state_dict().items()}, run(model)
    OFFLOADS[name](model, tmp_path, buffers)
    run(model)
    remove_hook_from_module(model, recurse=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(value.equal(before[key]) for key, value in after.items())
    assert run(model).equal(wanted)


def test_generating_with_an_offloaded_model(new_model: NewModel, tmp_path: Path) -> None:
    model = _quantized_model(new_model, "llama", "nf4:g64:dq")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = torch.tensor([[3, 14, 15]])
    wanted = model.generate(tokens, **settings)
    for index, offload in enumerate(OFFLOADS.values()):
        offloaded = copy.deepcopy(model)
        offload(offloaded, tmp_path / str(index), False)
        assert offloaded.generate(tokens, **settings).equal(wanted)


def test_a_checkpoint_of_live_names_loads_and_dispatches(
    new_model: NewModel, run: Run, tmp_path: Path
) -> None:
    from accelerate import Accelerator

    model = _quantized_model(new_model, "llama_bias", "nf4:g64:dq")
    Accelerator(cpu=True).save_model(model, tmp_path / "saved")
    empty = new_model("llama_bias").to(torch.bfloat16)
    rotary = copy.deepcopy(empty.model.rotary_emb)
    fewbits.quantize_model(empty.to("meta"), "nf4:g64:dq")
    empty.model.rotary_emb = rotary  # never in files
    load_checkpoint_and_dispatch(
        empty, tmp_path / "saved", _second_layer_on_the_disk(model), offload_folder=tmp_path / "away"
    )
    assert empty.model.layers[1].mlp.up_proj.weight.is_meta
    assert run(empty).equal(run(model))


# --- memory that is used again ----------------------------------------------------------------------


def test_other_codes_at_the_same_address_are_computed_with() -> None:
    """An offloaded layer comes back to memory that another one may have had."""
    torch.manual_seed(5)
    source, other = nn.Sequential(nn.Linear(64, 48)), nn.Sequential(nn.Linear(64, 48))
    for model in (source, other):
        fewbits.quantize_model(model, "nf4:g64:dq")
    x = torch.randn(1, 64)
    with torch.no_grad():
        wanted = other(x)
        assert not source(x).equal(wanted)
        places = [tensor.data_ptr() for tensor in source.state_dict().values()]
        source.load_state_dict(other.state_dict())
        assert [tensor.data_ptr() for tensor in source.state_dict().values()] == places
        assert source(x).equal(wanted)


def test_a_bias_of_another_dtype_at_the_same_address() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(64, 48))
    fewbits.quantize_model(model, "nf4:g64")
    layer: Any = model[0]
    memory = torch.empty(48 * 4, dtype=torch.uint8)
    values = torch.randn(48).bfloat16()
    x = torch.randn(1, 64)
    results = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            view = memory[: 48 * dtype.itemsize].view(dtype)
            view.copy_(values)
            layer.bias = nn.Parameter(view, requires_grad=False)
            assert layer.bias.data_ptr() == memory.data_ptr()
            results.append(model(x))
    assert results[0].equal(results[1])


def test_layers_of_one_shape_take_turns_in_freed_memory(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    fewbits.quantize_model(model, "int4:g32:zero")
    inputs = [torch.randn(1, 64) for _ in range(4)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        disk_offload(model, tmp_path, "cpu")
        for x, y in zip(inputs, wanted, strict=True):
            assert model(x).equal(y)


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_gradients_through_offloaded_layers(where: str, new_model: NewModel, tmp_path: Path) -> None:
    ids = torch.arange(10).reshape(2, 5) + 4
    gradients = []
    for offloaded in (False, True):
        model = _quantized_model(new_model, "llama", "nf4:g64:dq")
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if offloaded:  # the frozen base only: adapters stay
            for name, layer in adapted.named_modules():
                if isinstance(layer, QuantModule):
                    OFFLOADS[where](layer, tmp_path / name, False)
                    assert layer.weight.is_meta
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().sum() > 0
        assert gradient.equal(gradients[1][name])


# --- loaded from the disk ---------------------------------------------------------------------------

BITSANDBYTES = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


@by_buffers
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", BITSANDBYTES),
        ("llama_tied", BITSANDBYTES),
        ("llama_tied", FewbitsConfig("int4:g16:zero", {"embed_tokens": "int4:g16:zero"})),
        ("mixtral", FewbitsConfig("nf4:g64:dq")),
        ("gpt_oss", FewbitsConfig("mxfp4")),
    ],
    ids=["conv1d", "tied", "tied_embeddings", "experts", "transposed_experts"],
)
def test_all_of_a_quantized_checkpoint_runs_from_the_disk_and_saves_exactly(
    kind: str,
    config: Any,
    buffers: bool,
    checkpoint: Checkpoint,
    load: Load,
    run: Run,
    same_tensors: Same,
    tmp_path: Path,
) -> None:
    wanted = load(checkpoint(kind, torch.bfloat16), config)
    wanted.save_pretrained(tmp_path / "saved")
    options = {"offload_folder": tmp_path / "away", "offload_buffers": buffers}
    model = load(tmp_path / "saved", device_map={"": "disk"}, **options)
    for _ in range(2):
        assert run(model).equal(run(wanted))
    model.save_pretrained(tmp_path / "again")
    same_tensors(tmp_path / "saved", tmp_path / "again")


@pytest.mark.parametrize("given", ["auto", "sequential"])
def test_an_inferred_map_with_layers_on_the_disk(
    given: str, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    options = {"device_map": given, "max_memory": {"cpu": 45_000}, "offload_folder": tmp_path / "away"}
    with pytest.raises(ValueError, match=r"the disk \(.*save_pretrained") as raised:
        load(path, BITSANDBYTES, **options)
    assert "device_map='cpu'" in str(raised.value)
    wanted = load(path, BITSANDBYTES)
    wanted.save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", **options)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert run(model).equal(run(wanted))


# --- the CPU beside an accelerator ------------------------------------------------------------------
# The meta device plays the accelerator, with what the test does without.

AROUND = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


@pytest.mark.parametrize("config", [BITSANDBYTES, FewbitsConfig("int4:g16:zero")], ids=["nf4", "int4"])
@pytest.mark.parametrize("kind", ["llama", "llama_bias", "mixtral"])
def test_layers_on_the_cpu_are_computed_there(
    kind: str, config: Any, checkpoint: Checkpoint, load: Load, quantized: Layers
) -> None:
    path = checkpoint(kind, torch.bfloat16)
    wanted = load(path, config)
    model = load(path, config, device_map={**dict.fromkeys(AROUND, "meta"), "model.layers": "cpu"})
    assert quantized(model).keys() == quantized(wanted).keys()
    layers = model.model.layers
    assert {str(tensor.device) for tensor in layers.parameters()} == {"cpu"}
    assert [name for name, module in layers.named_modules() if hasattr(module, "_hf_hook")] == ["0", "1"]
    hidden = torch.randn(2, 6, 64, dtype=torch.bfloat16)
    rotations = wanted.model.rotary_emb(hidden, torch.arange(6)[None])
    with torch.no_grad():
        for layer, other in zip(layers, wanted.model.layers, strict=True):
            result = layer(hidden, position_embeddings=rotations)
            assert result.equal(other(hidden, position_embeddings=rotations))


def test_single_layers_on_the_cpu(checkpoint: Checkpoint, load: Load, run: Run) -> None:
    """Only what the map names, whatever lies inside of it; every border is a hook."""
    model = load(checkpoint("llama", torch.bfloat16), BITSANDBYTES)
    wanted = run(model)
    cpu_offload(model, "cpu")
    model.hf_device_map = {
        "": 0,
        "model.layers": "cpu",
        "model.layers.1": 0,
        "lm_head": "cpu",
        "model.norm": "disk",
    }
    placement.keep_on_cpu(model)
    for name, layer in model.named_modules():
        if list(layer.parameters(recurse=False)):
            inside = name.startswith("model.layers.0")
            assert hasattr(layer, "_hf_hook") is not inside, name
    assert {name for name, parameter in model.named_parameters() if not parameter.is_meta} == {
        name for name, _ in model.named_parameters() if name.startswith(("model.layers.0", "lm_head"))
    }
    for name in ("model.layers.0", "lm_head"):
        hook = model.get_submodule(name)._hf_hook
        assert (hook.execution_device, hook.offload, hook.io_same_device) == ("cpu", False, True)
    assert run(model).equal(wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [BITSANDBYTES, FewbitsConfig("int4:g16:zero")], ids=["nf4", "int4"])
def test_a_model_split_between_an_accelerator_and_the_cpu(
    config: Any, checkpoint: Checkpoint, load: Load, run: Run
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    model = load(
        path, config, device_map={**dict.fromkeys(AROUND, 0), "model.layers.0": 0, "model.layers.1": "cpu"}
    )
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "cpu"
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "cuda"
    torch.testing.assert_close(
        run(model).cpu(), run(load(path, config, device_map="cpu")), atol=0.1, rtol=0.1
    )

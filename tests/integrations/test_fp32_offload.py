"""`llm_int8_enable_fp32_cpu_offload`: what a device map offloads stays in float32, and works so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.integrations.accelerate as maps
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
NewModel = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]

AROUND = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
ON_CPU = {**dict.fromkeys(AROUND, "cpu"), "model.layers.0": "cpu", "model.layers.1": "cpu"}
LAYER = {**ON_CPU, "model.layers.1": "disk"}
EDGES = {**ON_CPU, "model.embed_tokens": "disk", "model.norm": "disk", "lm_head": "disk"}
ONE = {
    **{f"model.layers.0.{name}": "cpu" for name in ("self_attn", "input_layernorm")},
    **{f"model.layers.0.{name}": "cpu" for name in ("post_attention_layernorm", "mlp.act_fn")},
    **{f"model.layers.0.mlp.{name}_proj": "cpu" for name in ("up", "gate")},
    **{name: place for name, place in ON_CPU.items() if name != "model.layers.0"},
    "model.layers.0.mlp.down_proj": "disk",
}
FLAG = "llm_int8_enable_fp32_cpu_offload"
METHODS = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def _config(method: dict[str, Any], **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**method, **{FLAG: True}, **options)


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@by_method
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "llama_bias"])
@pytest.mark.parametrize("device_map", [LAYER, EDGES, ONE], ids=["layer", "edges", "one"])
def test_it_runs_beside_16_bits_and_comes_back(
    device_map: dict[str, str],
    kind: str,
    method: dict[str, Any],
    checkpoint: Checkpoint,
    load: Load,
    run: Run,
    quantized: Layers,
    tensors_of: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    options = {"device_map": device_map, "offload_folder": tmp_path / "away", "dtype": torch.bfloat16}
    source = checkpoint(kind)  # in float32: nothing may be rounded on the way
    model = load(source, _config(method), **options)
    away = tuple(name for name, place in device_map.items() if place == "disk")
    if kind == "llama_tied" and "lm_head" in away:
        away = (*away, "model.embed_tokens")
    assert not any(name.startswith(away) for name in quantized(model))
    assert len(quantized(model)) == {"layer": 7, "edges": 14, "one": 13}[_name(device_map)]
    for name, parameter in model.named_parameters():
        if name.startswith(away):
            assert parameter.dtype == torch.float32, name
        elif name.rpartition(".")[0] not in quantized(model):
            assert parameter.dtype == torch.bfloat16, name
    logits = run(model)
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    for entry in fewbits.report(model).entries:
        if entry.name.startswith(away):
            assert (entry.stored, entry.quantized) == ("float32", False)
            assert entry.reason == f"float32 on the disk, with {FLAG}"
        else:
            assert FLAG not in entry.reason
    model.save_pretrained(tmp_path / "saved")
    plain = tensors_of(source)
    for name, tensor in tensors_of(tmp_path / "saved").items():
        if name.startswith(away):
            assert tensor.equal(plain[name])
    again = load(tmp_path / "saved", **options)
    assert run(again).equal(logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = torch.tensor([[3, 14, 15]])
    assert model.generate(tokens, **settings).equal(again.generate(tokens, **settings))


def _name(device_map: dict[str, str]) -> str:
    return "layer" if device_map is LAYER else "edges" if device_map is EDGES else "one"


def _second_layers_on_the_disk(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """A map with an entry for every module that holds none of them, and for parameters beside them."""
    places = {}
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        below = {one for one, other in module.named_modules() if isinstance(other, nn.ModuleList)}
        if isinstance(module, nn.ModuleList) and len(module) == 2:
            places |= {f"{path}.0": "cpu", f"{path}.1": "disk"}
        elif below:
            places |= _second_layers_on_the_disk(module, f"{path}.")
            places |= {f"{path}.{one}": "cpu" for one, _ in module.named_parameters(recurse=False)}
        else:
            places[path] = "cpu"
    return places


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "t5", "mixtral", "gpt_oss", "qwen2_moe"])
def test_other_architectures(
    kind: str, checkpoint: Checkpoint, load: Load, run: Run, new_model: NewModel, tmp_path: Path
) -> None:
    path = checkpoint(kind, torch.bfloat16)
    places = _second_layers_on_the_disk(new_model(kind))
    options = {"device_map": places, "offload_folder": tmp_path / "away", "dtype": torch.bfloat16}
    model = load(path, _config(METHODS["8bit"]), **options)
    away = tuple(name for name, place in places.items() if place == "disk")
    assert len(away) == (2 if kind == "t5" else 1)
    for name, parameter in model.named_parameters():
        assert not name.startswith(away) or parameter.dtype == torch.float32, name
    logits, plain = run(model), run(load(path, dtype=torch.float32))
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - plain).norm() < 0.2 * plain.norm()  # routing may flip
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", **options)
    if model.config.quantization_config.quant_method == "fewbits":  # fused experts: no such option there
        torch.testing.assert_close(run(again), logits, atol=0.2, rtol=0.2)
    else:
        assert run(again).equal(logits)


def test_all_of_an_offloaded_layer_is_computed_in_float32(
    checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    model = load(path, _config(METHODS["4bit"]), device_map=LAYER, offload_folder=tmp_path)
    plain = load(path, dtype=torch.float32).model.layers[1]
    taken: dict[str, Any] = {}
    layer = model.model.layers[1]
    before = layer.register_forward_pre_hook(
        lambda _, x, more: taken.update(x=x, more=more), with_kwargs=True
    )
    after = layer.register_forward_hook(lambda _, x, y: taken.update(y=y))
    with torch.no_grad():
        model(torch.arange(12)[None] + 2, use_cache=False)
        assert taken["x"][0].dtype == torch.float32
        assert {one.dtype for one in taken["more"]["position_embeddings"]} == {torch.float32}
        wanted = plain(*taken["x"], **taken["more"])
    assert taken["y"].dtype == torch.bfloat16
    assert taken["y"].equal(wanted.bfloat16())
    before.remove()
    after.remove()


@by_method
def test_what_was_kept_is_read_without_the_map(
    method: dict[str, Any], checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    model = load(path, _config(method), device_map=LAYER, offload_folder=tmp_path / "away")
    model.save_pretrained(tmp_path / "saved")
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert "model.layers.1.mlp.up_proj" in skipped
    assert "lm_head" in skipped
    again = load(tmp_path / "saved", device_map="cpu")
    assert quantized(again).keys() == quantized(model).keys()
    assert _dtypes(again.model.layers[1]) == {torch.bfloat16}
    plain = load(path, dtype=torch.bfloat16)
    assert again.model.layers[1].mlp.up_proj.weight.equal(plain.model.layers[1].mlp.up_proj.weight)
    assert torch.isfinite(run(again)).all()


@by_method
def test_bitsandbytes_reads_what_was_kept(
    method: dict[str, Any], checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(
        checkpoint("llama", torch.bfloat16),
        _config(method),
        device_map=LAYER,
        offload_folder=tmp_path / "away",
    )
    model.save_pretrained(tmp_path / "saved")
    mine = load(tmp_path / "saved", device_map="cpu")
    fewbits.enable(takeover=False)
    other = load(tmp_path / "saved", device_map="cpu")
    assert type(other.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert type(other.model.layers[1].mlp.up_proj) is nn.Linear
    for one, two in zip(mine.model.layers[1].parameters(), other.model.layers[1].parameters(), strict=True):
        assert one.equal(two.to(one.dtype))


# --- which maps -------------------------------------------------------------------------------------


@by_method
@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, ON_CPU], ids=str)
def test_nothing_is_offloaded_from_one_cpu(
    device_map: Any, method: dict[str, Any], checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers
) -> None:
    if torch.accelerator.is_available() and device_map in (None, "auto"):
        pytest.skip("None and auto go to the accelerator of this machine")
    path = checkpoint("llama", torch.bfloat16)
    model = load(path, _config(method), device_map=device_map)
    assert len(quantized(model)) == 14
    assert run(model).equal(run(load(path, BitsAndBytesConfig(**method), device_map="cpu")))
    assert model.config.quantization_config.llm_int8_skip_modules is None


def test_a_base_model_on_the_disk(
    checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    """Its result is an object with tensors in it."""
    path, places = checkpoint("llama", torch.bfloat16), {"model": "disk", "lm_head": "cpu"}
    model = load(
        path, _config(METHODS["4bit"]), device_map=places, offload_folder=tmp_path, dtype=torch.bfloat16
    )
    assert not quantized(model)
    plain = load(path, dtype=torch.float32).model(torch.arange(5)[None] + 3)
    base = model.model(torch.arange(5)[None] + 3)
    assert type(base) is type(plain)
    assert base.last_hidden_state.equal(plain.last_hidden_state.bfloat16())
    assert model(torch.arange(5)[None] + 3).logits.dtype == torch.bfloat16


def test_a_whole_model_on_the_disk(checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path) -> None:
    path = checkpoint("llama", torch.bfloat16)
    model = load(path, _config(METHODS["4bit"]), device_map={"": "disk"}, offload_folder=tmp_path)
    assert _dtypes(model) == {torch.float32}
    assert run(model).equal(run(load(path, dtype=torch.float32)))


@pytest.mark.parametrize("kind", ["llama", "llama_bias"])
def test_a_quantized_checkpoint_stays_quantized(
    kind: str, checkpoint: Checkpoint, load: Load, quantized: Layers, run: Run, tmp_path: Path
) -> None:
    """There are no other weights to go back to; what is not quantized is in float32."""
    load(checkpoint(kind, torch.bfloat16), _config(METHODS["4bit"])).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", device_map=LAYER, offload_folder=tmp_path / "away")
    assert len(quantized(model)) == 14
    assert model.model.layers[1].input_layernorm.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    reasons = {entry.name: entry.reason for entry in fewbits.report(model).kept}
    assert FLAG in reasons["model.layers.1.input_layernorm.weight"]
    assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("given", ["auto", "sequential"])
def test_an_inferred_map(
    given: str, checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers, tmp_path: Path
) -> None:
    limit = 200_000
    options = {"device_map": given, "max_memory": {"cpu": limit}, "offload_folder": tmp_path / "away"}
    path = checkpoint("llama", torch.bfloat16, num_hidden_layers=12)
    model = load(path, _config(METHODS["4bit"]), **options)
    here = {name for name, place in model.hf_device_map.items() if place == "cpu"}
    assert here
    assert here != set(model.hf_device_map)
    assert quantized(model)
    for name, place in model.hf_device_map.items():
        module = model.get_submodule(name)
        in_float32 = _dtypes(module) == {torch.float32}
        assert in_float32 or place == "cpu" or not list(module.parameters())
    held = sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta)
    assert held <= 0.9 * limit
    assert torch.isfinite(run(model)).all()
    model.save_pretrained(tmp_path / "saved")
    assert "model.layers.11.mlp.up_proj" in model.config.quantization_config.llm_int8_skip_modules
    dtype = {"dtype": torch.bfloat16}
    again = load(tmp_path / "saved", **{**options, "device_map": model.hf_device_map, **dtype})
    assert run(again).equal(run(model))


def _empty(new_model: NewModel, **settings: Any) -> Any:
    return new_model("llama", **settings).to(torch.bfloat16).to("meta")


def test_a_map_inferred_for_an_accelerator_counts_float32(
    new_model: NewModel, quantized: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sizes only: the accelerator need not be there."""
    monkeypatch.setattr(maps, "get_max_memory", lambda max_memory: dict(max_memory))
    quantizer = FewbitsQuantizer(_config(METHODS["4bit"]), pre_quantized=False)
    model = _empty(new_model, num_hidden_layers=12)
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map="auto")
    assert len(quantized(model)) == 84
    limits = {0: 200_000, "cpu": 2_000_000}
    found = maps._get_device_map(model, "auto", limits, quantizer)
    assert set(found.values()) == {0, "cpu"}
    sizes, _ = maps.compute_module_sizes(model, quantizer)
    used = {place: sum(sizes[n] for n, p in found.items() if p == place) for place in limits}
    assert all(used[place] <= 0.9 * limits[place] for place in limits)
    for name, place in found.items():
        for layer, module in model.get_submodule(name).named_modules(prefix=name):
            assert (layer in quantized(model)) <= (place == 0)
            if list(module.parameters(recurse=False)) and place == "cpu":
                assert {p.dtype for p in module.parameters(recurse=False)} == {torch.float32}


def test_nested_maps_and_containers(new_model: NewModel, quantized: Layers) -> None:
    """The nearest entry counts, and casts happen where modules are called, not at lists of them."""
    quantizer = FewbitsQuantizer(_config(METHODS["8bit"]), pre_quantized=False)
    model = _empty(new_model)
    places = {"model": 0, "lm_head": 0, "model.layers": "cpu", "model.layers.0": torch.device("cuda", 1)}
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=places)
    assert {name.split(".")[2] for name in quantized(model)} == {"0"}
    assert _dtypes(model.model.layers[1]) == {torch.float32}
    casting = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    assert casting == {"model.layers.1"}


def test_a_float32_model_needs_no_casts(new_model: NewModel) -> None:
    quantizer = FewbitsQuantizer(_config(METHODS["4bit"]), pre_quantized=False)
    model = _empty(new_model).to(torch.float32)
    quantizer.preprocess_model(model=model, dtype=torch.float32, device_map={"": 0, "model.layers.1": "cpu"})
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- copies and dequantizing ------------------------------------------------------------------------


def test_dequantizing_ends_it(checkpoint: Checkpoint, load: Load) -> None:
    """The meta device plays the accelerator, and holds what the test does without."""
    path = checkpoint("llama", torch.bfloat16)
    places = {**dict.fromkeys(AROUND, "meta"), "model.layers": "cpu"}
    model = load(path, _config(METHODS["4bit"]), device_map=places, dtype=torch.bfloat16)
    plain = copy.deepcopy(model).dequantize()
    for one, dtype in ((model, torch.float32), (plain, torch.bfloat16)):
        assert _dtypes(one.model.layers) == {dtype}
        assert {name for name, module in one.named_modules() if module._forward_pre_hooks} == (
            {"model.layers.0", "model.layers.1"} if dtype == torch.float32 else set()
        )
    hidden = torch.randn(2, 6, 64, dtype=torch.bfloat16)
    other = load(path, dtype=torch.bfloat16)
    rotations = other.model.rotary_emb(hidden, torch.arange(6)[None])
    for layer, same in zip(plain.model.layers, other.model.layers, strict=True):
        wanted = same(hidden, position_embeddings=rotations)
        assert layer(hidden, position_embeddings=rotations).equal(wanted)


@pytest.mark.gpu
@by_method
def test_float32_on_the_cpu_beside_an_accelerator(
    method: dict[str, Any], checkpoint: Checkpoint, load: Load, run: Run
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    places = {**dict.fromkeys(AROUND, 0), "model.layers.0": 0, "model.layers.1": "cpu"}
    model = load(path, _config(method), device_map=places, dtype=torch.bfloat16)
    layer = model.model.layers[1]
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("cpu", torch.float32)}
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "cuda"
    plain = run(load(path, dtype=torch.float32))
    assert (run(model).cpu().float() - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize(
    "away", [("model.norm",), ("lm_head",), ("model.embed_tokens", "model.norm")], ids=str
)
def test_adapters_train_after_kbit_preparation(
    away: tuple[str, ...], checkpoint: Checkpoint, load: Load, tmp_path: Path
) -> None:
    """It brings the rest to float32 as well, where casts back to 16 bits would meet float32 weights."""
    device_map = {**ON_CPU, **dict.fromkeys(away, "disk")}
    model = load(
        checkpoint("llama", torch.bfloat16),
        _config(METHODS["4bit"]),
        dtype=torch.bfloat16,
        device_map=device_map,
        offload_folder=str(tmp_path),
    )
    peft.prepare_model_for_kbit_training(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).train()
    ids = torch.arange(12).reshape(2, 6) + 2
    adapted(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_dequantizing_under_adapters_leaves_no_float32_behind(checkpoint: Checkpoint, load: Load) -> None:
    device_map = {**dict.fromkeys(AROUND, "meta"), "model.layers": "cpu"}
    model = load(
        checkpoint("llama", torch.bfloat16),
        _config(METHODS["4bit"]),
        dtype=torch.bfloat16,
        device_map=device_map,
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.get_base_model().dequantize()
    dtypes = {parameter.dtype for name, parameter in adapted.named_parameters() if "lora" not in name}
    assert dtypes == {torch.bfloat16}

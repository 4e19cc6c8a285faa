"""Files that bitsandbytes wrote: loaded, saved again, spread over several files, and damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import fewbits
from fewbits.nn import QuantLinear

GOLDEN = Path(__file__).parent.parent / "golden" / "bitsandbytes"
FOLDERS = ("nf4", "fp4", "nf4_double", "nf4_bfloat16_storage", "int8", "nf4_transposed")
STATE = "weight.quant_state.bitsandbytes__"


@pytest.fixture(autouse=True)
def _takeover() -> Iterator[None]:
    fewbits.enable(takeover=True)
    yield
    fewbits.enable()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Folder → (the golden model as fewbits loads it, where it saved it again)."""
    fewbits.enable(takeover=True)
    found = {}
    for folder in FOLDERS:
        model = AutoModelForCausalLM.from_pretrained(GOLDEN / folder)
        target = tmp_path_factory.mktemp(folder)
        model.save_pretrained(target)
        found[folder] = model, target
    return found


def layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def digests(model: Any, prefix: str = "") -> dict[str, str]:
    """Of the bytes of every quantized weight, decoded to float32."""
    values = {
        f"{prefix}{name}": layer.quantized_weight().dequantize(torch.float32)
        for name, layer in layers(model).items()
    }
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in values.items()}


def golden_digests(folder: str) -> dict[str, str]:
    found: dict[str, str] = json.loads((GOLDEN / folder / "decoded.json").read_text())
    return found


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Everything that a file says of a tensor; -0 and NaN count as what they are."""
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def same_bits(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert sorted(tensors) == sorted(others)
    assert [key for key in tensors if bits(tensors[key]) != bits(others[key])] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_weights_decode_to_the_bits_that_bitsandbytes_decodes(
    loaded: dict[str, tuple[Any, Path]], folder: str
) -> None:
    values = {
        name: layer.quantized_weight().dequantize(torch.float32)
        for name, layer in layers(loaded[folder][0]).items()
    }
    for name, expected in load_file(GOLDEN / folder / "decoded.safetensors").items():
        torch.testing.assert_close(values[name], expected, rtol=0, atol=0)
    assert digests(loaded[folder][0]) == golden_digests(folder)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "nf4_transposed"])
def test_a_golden_file_saved_again_has_the_same_keys_and_bytes(
    loaded: dict[str, tuple[Any, Path]], folder: str
) -> None:
    saved = load_file(loaded[folder][1] / "model.safetensors")
    same_bits(saved, load_file(GOLDEN / folder / "model.safetensors"))


def test_the_transposed_scales_of_the_avx512_path_are_saved_in_the_canonical_form(
    loaded: dict[str, tuple[Any, Path]],
) -> None:
    golden = load_file(GOLDEN / "nf4_transposed" / "model.safetensors")
    transposed = {key for key in golden if key.endswith("absmax")}
    assert {golden[key].dtype for key in transposed} == {torch.bfloat16}
    assert golden["model.layers.0.mlp.down_proj.weight.absmax"].shape == (2, 64)
    canonical = {
        key: tensor.T.reshape(-1).float() if key in transposed else tensor for key, tensor in golden.items()
    }
    same_bits(load_file(loaded["nf4_transposed"][1] / "model.safetensors"), canonical)


def test_scales_quantized_again_after_a_forward_pass_decode_to_the_precision_of_their_dtype() -> None:
    folder = GOLDEN / "nf4_double_after_forward"
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(layers(model)) == 7
    for name, expected in load_file(folder / "decoded.safetensors").items():
        state = json.loads(bytes(tensors[f"{name}.{STATE}nf4"].tolist()))
        assert (state["dtype"], state["nested_dtype"]) == ("bfloat16", "bfloat16")
        decoded = layers(model)[name].quantized_weight().dequantize(torch.float32)
        torch.testing.assert_close(decoded, expected, rtol=2 * 2**-8, atol=0)


def test_scales_quantized_again_after_a_forward_pass_are_saved_with_the_same_bytes(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "nf4_double_after_forward" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(GOLDEN / "nf4_double_after_forward").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    states = {key for key in golden if "quant_state" in key}
    assert len(states) == 7
    for key in states:
        old, new = (json.loads(bytes(tensors.pop(key).tolist())) for tensors in (golden, saved))
        assert new == old | {"nested_dtype": "float32"}
    same_bits(saved, golden)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_golden_config_saved_again_says_the_same(loaded: dict[str, tuple[Any, Path]], folder: str) -> None:
    saved = json.loads((loaded[folder][1] / "config.json").read_text())
    golden = json.loads((GOLDEN / folder / "config.json").read_text())
    assert saved["quantization_config"] == golden["quantization_config"]
    assert saved["dtype"] == golden["dtype"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_model_saved_again_answers_the_same_when_loaded(
    loaded: dict[str, tuple[Any, Path]], folder: str
) -> None:
    model, target = loaded[folder]
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        logits = model(tokens).logits
        again = AutoModelForCausalLM.from_pretrained(target)(tokens).logits
    assert bool(logits.isfinite().all())
    assert torch.equal(logits, again)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_models_answer_as_a_plain_model_with_the_decoded_weights(
    loaded: dict[str, tuple[Any, Path]], folder: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(model.config)
    tensors = load_file(GOLDEN / folder / "model.safetensors")
    for name, layer in layers(loaded[folder][0]).items():
        tensors[f"{name}.weight"] = layer.quantized_weight().dequantize(torch.float32)
    plain.load_state_dict({key: tensors[key].float() for key in plain.state_dict()})
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        expected, logits = plain.float().eval()(tokens).logits, model(tokens).logits
    error = float((logits - expected).norm() / expected.norm())
    # int8 rounds activations, too; the transposed file asks to compute in bfloat16
    assert error < {"int8": 2e-2, "nf4_transposed": 1e-2}.get(folder, 1e-5)


def test_the_storage_dtype_and_the_dtype_before_quantization_come_from_the_file(
    loaded: dict[str, tuple[Any, Path]],
) -> None:
    layer = layers(loaded["nf4_bfloat16_storage"][0])["model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == torch.bfloat16
    assert layer.dequantize().dtype == torch.bfloat16
    double = layers(loaded["nf4_double"][0])["model.layers.0.mlp.up_proj"]
    assert str(double.scheme.weight) == "nf4:g64:dq"
    assert double.dequantize().dtype == torch.float32


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_golden_folder_loads_into_the_model_without_a_head(folder: str) -> None:
    model = AutoModel.from_pretrained(GOLDEN / folder)
    assert digests(model, "model.") == golden_digests(folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_layers_may_be_spread_over_several_files(
    loaded: dict[str, tuple[Any, Path]], folder: str, tmp_path: Path
) -> None:
    loaded[folder][0].save_pretrained(tmp_path, max_shard_size="3KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {file for key, file in index.items() if "layers.0.mlp.down_proj" in key}
    assert len(parts) > 1
    assert digests(AutoModelForCausalLM.from_pretrained(tmp_path)) == golden_digests(folder)


@pytest.mark.parametrize("folder", ["nf4_double", "int8"])
def test_tensors_may_come_from_a_torch_file(folder: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / folder / "config.json", tmp_path)
    torch.save(load_file(GOLDEN / folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert digests(model) == golden_digests(folder)


@pytest.mark.parametrize("damage", ["weight", "weight.absmax", f"{STATE}nf4", "short scales"])
def test_a_damaged_golden_folder_does_not_load_and_the_layer_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = "model.layers.1.mlp.down_proj"
    if damage == "short scales":
        folder = _damaged(tmp_path, f"{path}.weight.absmax", torch.ones(3))
    else:
        folder = _damaged(tmp_path, f"{path}.{damage}", None)
    logger = logging.getLogger("transformers")  # does not pass its records on
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises((ValueError, RuntimeError)) as raised:
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert re.search(rf"ValueError: .*{re.escape(path)}\b", f"ValueError: {raised.value}\n{caplog.text}")


def _damaged(target: Path, key: str, value: Tensor | None) -> Path:
    """The golden folder nf4 with one tensor replaced or left out."""
    shutil.copytree(GOLDEN / "nf4", target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    del tensors[key]
    tensors |= {} if value is None else {key: value}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target

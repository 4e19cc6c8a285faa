"""LoRA over fused experts: against PEFT's own over plain ones, merging, what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fewbits

IDS = torch.arange(24).reshape(2, 12) * 7 % 94 + 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomize(model: nn.Module, scale: float = 0.05) -> None:
    """Adapters that do something: B starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, scale)


def bits(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {name: tensor.view(torch.uint8).clone() for name, tensor in state if "lora" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


MOE = {
    "mixtral": "mlp.experts",
    "qwen3_moe": "mlp.experts",
    "gpt_oss": "mlp.experts",
    "llama4": "feed_forward.experts",
}


def on_experts(kind: str) -> LoraConfig:
    names = [f"{MOE[kind]}.gate_up_proj", f"{MOE[kind]}.down_proj"]
    return LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM")


@pytest.mark.parametrize("kind", MOE)
def test_adapters_over_experts_compute_what_they_do_over_plain_ones(
    kind: str, model_of: Callable[..., Any], run: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = model_of("nf4:g32", kind)
    plain = copy.deepcopy(model).dequantize()
    adapted = get_peft_model(model, on_experts(kind))
    randomize(adapted, 0.1)
    before = run(model_of("nf4:g32", kind))
    adapted.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in other.named_parameters() if p.requires_grad]
    assert sum("experts" in name for name in trainable) >= 4
    for one in (adapted, other):
        one.eval()
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert (run(adapted) - run(other)).norm() < 1e-4 * run(other).norm()
    assert (run(adapted) - before).norm() > 1e-2 * before.norm()
    for name in trainable:
        mine, theirs = adapted.get_parameter(name).grad, other.get_parameter(name).grad
        assert (mine - theirs).norm() <= 2e-3 * theirs.norm(), name
    with adapted.disable_adapter():
        assert torch.equal(run(adapted), before)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("safe", [False, True])
def test_adapters_over_experts_merge_and_unmerge(
    kind: str, safe: bool, model_of: Callable[..., Any], run: Callable[..., Tensor]
) -> None:
    adapted = get_peft_model(model_of("int8:row", kind), on_experts(kind))
    randomize(adapted, 0.1)
    adapted.eval()
    before, trained = bits(adapted), run(adapted)
    adapted.merge_adapter(safe_merge=safe)
    assert not same(before, bits(adapted))
    assert (run(adapted) - trained).norm() < 0.05 * trained.norm()
    adapted.unmerge_adapter()
    assert same(before, bits(adapted))
    assert torch.equal(run(adapted), trained)
    merged = adapted.merge_and_unload(safe_merge=safe)
    notes = [entry.note for entry in fewbits.report(merged).quantized if "experts" in entry.name]
    assert notes
    assert all("of the change lost" in note for note in notes)
    assert (run(merged) - trained).norm() < 0.05 * trained.norm()


def test_a_broken_adapter_over_experts_is_not_merged(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of("nf4:g32", "mixtral"), on_experts("mixtral"))
    randomize(adapted)
    layer = adapted.base_model.model.model.layers[0].mlp.experts
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = torch.inf
    before = bits(adapted)
    for safe, message in ((True, "NaNs detected"), (False, r"up_proj\[|down_proj\[")):
        with pytest.raises(ValueError, match=message):
            layer.merge(safe_merge=safe)
        assert same(before, bits(adapted))
        assert layer.merged_adapters == []
    adapted.add_adapter("good", on_experts("mixtral"))
    with torch.no_grad():
        layer.lora_B["good"].weight.normal_()
    layer.merge(adapter_names=["good"])
    merged = bits(adapted)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default"])
    assert same(merged, bits(adapted))
    assert layer.merged_adapters == ["good"]

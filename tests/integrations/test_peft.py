"""Adapters of PEFT over quantized layers: training, merging, several of them, saving."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fewbits
from fewbits import FewbitsConfig
from fewbits.integrations.peft_merging import LoraLinear, Merging
from fewbits.nn import QuantEmbedding, QuantLinear

IDS = torch.arange(24).reshape(2, 12) * 7 % 94 + 2
SCHEMES = ("nf4:g64:dq", "fp4:g64", "int8:row", "int4:g32:f16:zero", "fp8_e4m3:row", "mxfp4", "nvfp4")
ALL_LINEAR = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FEW = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(model: Any, steps: int = 3, rate: float = 0.02) -> float:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss)


def randomize(model: nn.Module, scale: float = 0.05) -> None:
    """Adapters that do something: B starts at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, scale)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "llama_bias", "gpt2", "mixtral"])
def test_adapters_get_the_gradients_of_the_dequantized_model(
    scheme: str, kind: str, model_of: Callable[..., Any]
) -> None:
    if kind != "llama" and scheme not in SCHEMES[:3]:
        pytest.skip("other architectures with three formats")
    model = model_of(scheme, kind)
    plain = copy.deepcopy(model)
    plain = plain.dequantize() if hasattr(plain, "hf_quantizer") else plain
    gradients = []
    for one in (model, plain):
        torch.manual_seed(3)
        adapted = get_peft_model(one, LoraConfig(r=4, **ALL_LINEAR))
        torch.manual_seed(4)
        randomize(adapted)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert any(isinstance(module, LoraLinear) for module in model.modules())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 2e-3 * gradients[1][name].norm(), name


@pytest.mark.parametrize("scheme", ["nf4:g64:dq", "int8:row@int8:t6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(
    scheme: str, dtype: torch.dtype, reentrant: bool, model_of: Callable[..., Any]
) -> None:
    found = []
    for checkpointing in (False, True):
        model = model_of(scheme, dtype=dtype)
        peft.prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing == checkpointing
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(r=4, **ALL_LINEAR)).train()
        randomize(adapted)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(one.abs().sum() > 0 for one in found[1])


def test_the_loss_falls_as_with_the_dequantized_model(model_of: Callable[..., Any]) -> None:
    losses = []
    for dequantized in (False, True):
        model = model_of()
        model = model.dequantize() if dequantized else model
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.0, **ALL_LINEAR))
        losses.append([train(adapted, 1, 0.5), train(adapted, 8, 0.5)])
    assert losses[0][1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# --- merging ----------------------------------------------------------------------------------------

VARIANTS = {
    "lora": LoraConfig(r=8, **ALL_LINEAR),
    "rslora": LoraConfig(r=8, use_rslora=True, **ALL_LINEAR),
    "dora": LoraConfig(r=8, use_dora=True, **ALL_LINEAR),
    "pissa": LoraConfig(r=8, init_lora_weights="pissa", **ALL_LINEAR),
    "olora": LoraConfig(r=8, init_lora_weights="olora", **ALL_LINEAR),
    "orthogonal": LoraConfig(r=8, init_lora_weights="orthogonal", **ALL_LINEAR),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "miss": peft.MissConfig(r=8, **FEW),
    "oft": peft.OFTConfig(oft_block_size=16, **FEW),
    "boft": peft.BOFTConfig(boft_block_size=8, **FEW),
    "shira": peft.ShiraConfig(r=4, **FEW),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **FEW),
    "adalora": peft.AdaLoraConfig(r=4, total_step=10, **FEW),
    "road": peft.RoadConfig(**FEW),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **FEW),
    "randlora": peft.RandLoraConfig(r=4, **FEW),
    "c3a": peft.C3AConfig(block_size=16, **FEW),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_rounds_once_and_unmerging_is_exact(variant: str, model_of: Callable[..., Any]) -> None:
    # The same formula on plain weights, rounded afterwards, is what merging has to give.
    adapted = get_peft_model(model_of(), VARIANTS[variant])
    train(adapted)
    before, trained = bits(adapted), logits(adapted)
    wide = copy.deepcopy(adapted)
    names = {id(module): name for name, module in adapted.named_modules()}
    for module in list(adapted.modules()):
        if hasattr(module, "merge") and isinstance(getattr(module, "base_layer", None), QuantLinear):
            other = wide.get_submodule(names[id(module)])
            layer = other.base_layer
            plain = nn.Linear(layer.in_features, layer.out_features, False)
            plain.weight = nn.Parameter(layer.quantized_weight().dequantize(torch.float32))
            other.base_layer, other.quantization_backend = plain, None
            super(Merging, other).merge()  # the method of PEFT's own class, which follows ours
            module.merge()
            expected = fewbits.quantize(plain.weight, "nf4:g64:dq")
            assert module.base_layer.quantized_weight() == expected, names[id(module)]
    assert not same(before, bits(adapted))
    assert torch.isfinite(logits(adapted)).all()
    adapted.unmerge_adapter()
    assert same(before, bits(adapted))
    assert torch.equal(logits(adapted), trained)


@pytest.mark.parametrize("config", [peft.LoHaConfig(r=4), peft.LoKrConfig(r=4), peft.HRAConfig(r=4)])
def test_what_computes_with_weights_is_refused(config: Any, model_of: Callable[..., Any]) -> None:
    config.target_modules = ["q_proj"]
    with pytest.raises(ValueError, match="computes with the weights it adapts"):
        get_peft_model(model_of(), config)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("scheme", ["nf4:g64:dq", "int8:row", "int8:row@int8:t6", "fp8_e4m3:row"])
def test_merge_and_unload_keeps_the_format_and_reports_the_error(
    scheme: str, safe: bool, model_of: Callable[..., Any]
) -> None:
    adapted = get_peft_model(model_of(scheme), LoraConfig(r=8, **ALL_LINEAR))
    randomize(adapted)
    trained = logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=safe)
    layer = merged.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    assert str(layer.scheme) == scheme
    assert not any("lora" in name for name, _ in merged.named_modules())
    limit = 0.05 if scheme.startswith("int8") else 0.25
    assert (logits(merged) - trained).norm() < limit * trained.norm()
    entry = next(
        one for one in fewbits.report(merged).quantized if one.name.endswith("0.self_attn.q_proj.weight")
    )
    numbers = re.fullmatch(
        r"merged default: ([\d.]+) of the weight, ([\d.e-]+) of the change lost", entry.note
    )
    assert numbers is not None
    assert float(numbers[1]) == pytest.approx(entry.relative_error, abs=1e-4)
    assert 0 < float(numbers[1]) < float(numbers[2])


def test_what_a_merge_loses_is_what_the_report_says(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of(), LoraConfig(r=8, **ALL_LINEAR))
    randomize(adapted)
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    first = layer.base_layer.quantized_weight().dequantize()
    change = layer.get_delta_weight("default").detach()
    with pytest.warns(UserWarning, match="merging into quantized weights rounds them again"):
        layer.merge()
    lost = (first + change - layer.base_layer.dequantize()).norm()
    note = layer.base_layer.notes["weight"]
    assert f"{lost / change.norm():.3g} of the change lost" in note
    assert f"{lost / (first + change).norm():.4f} of the weight" in note
    layer.unmerge()
    assert not layer.base_layer.notes


def test_merging_twice_rounds_once(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of(), LoraConfig(r=4, **ALL_LINEAR))
    adapted.add_adapter("second", LoraConfig(r=8, **ALL_LINEAR))
    randomize(adapted)
    before = bits(adapted)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    first = layer.base_layer.quantized_weight().dequantize(torch.float32)
    whole = first + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["default", "second"]
    assert layer.base_layer.quantized_weight() == fewbits.quantize(whole, "nf4:g64:dq")
    assert "merged default, second" in layer.base_layer.notes["weight"]
    layer.unmerge()
    assert layer.merged_adapters == []
    assert same(before, bits(adapted))


def test_a_broken_adapter_is_not_merged(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of(kind="llama_bias"), LoraConfig(r=4, lora_bias=True, **ALL_LINEAR))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    randomize(adapted)
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = torch.nan
        layer.lora_B["default"].bias.fill_(0.5)
    before = bits(adapted)
    for safe, message in ((True, "NaNs detected"), (False, "NaN")):
        with pytest.raises(ValueError, match=message):
            layer.merge(safe_merge=safe)
        assert same(before, bits(adapted))
        assert layer.merged_adapters == []
        assert isinstance(layer.base_layer, QuantLinear)


def test_the_bias_of_an_adapter_is_merged_and_unmerged(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of(kind="llama_bias"), LoraConfig(r=4, lora_bias=True, **ALL_LINEAR))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    before, trained = bits(adapted), logits(adapted)
    adapted.merge_adapter()
    # A · B is zero, so nothing but the biases change, and those are not rounded.
    assert torch.allclose(logits(adapted), trained, atol=5e-3)
    adapted.unmerge_adapter()
    assert same(before, bits(adapted))


def test_an_adapter_without_change_merges_into_the_same_codes(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of("int4:g32:zero"), LoraConfig(r=4, **ALL_LINEAR))
    trained = logits(adapted)
    adapted.merge_adapter()
    assert torch.allclose(logits(adapted), trained, atol=1e-4)


# --- several adapters, saving -----------------------------------------------------------------------


def test_adapters_are_saved_and_loaded(model_of: Callable[..., Any], tmp_path: Path) -> None:
    adapted = get_peft_model(model_of(), LoraConfig(r=4, use_dora=True, **ALL_LINEAR))
    randomize(adapted)
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(), tmp_path)
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(model_of()))
    assert torch.equal(logits(again), trained)


def test_adapters_side_by_side_and_in_one_batch(model_of: Callable[..., Any], tmp_path: Path) -> None:
    adapted = get_peft_model(model_of(), LoraConfig(r=4, **ALL_LINEAR), adapter_name="one")
    adapted.add_adapter("two", LoraConfig(r=8, target_modules=["v_proj"]))
    randomize(adapted, 0.2)
    adapted.eval()
    found = {}
    for name in ("one", "two"):
        adapted.set_adapter(name)
        found[name] = logits(adapted)
    assert not torch.allclose(found["one"], found["two"])
    with torch.no_grad():
        mixed = adapted(input_ids=IDS, adapter_names=["one", "two"]).logits
    assert torch.allclose(mixed[0], found["one"][0], atol=1e-4)
    assert torch.allclose(mixed[1], found["two"][1], atol=1e-4)


def test_an_adapter_trained_on_codes_merges_into_plain_weights(
    model_of: Callable[..., Any], tmp_path: Path
) -> None:
    adapted = get_peft_model(model_of(kind="gpt2"), LoraConfig(r=4, fan_in_fan_out=True, **ALL_LINEAR))
    randomize(adapted)
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(model_of(kind="gpt2").dequantize(), tmp_path).merge_and_unload()
    assert (logits(plain) - trained).norm() < 1e-4 * trained.norm()


def test_a_quantized_embedding_trains_and_merges(model_of: Callable[..., Any]) -> None:
    config = FewbitsConfig("nf4:g64", {"embed_tokens": "int8:row"})
    model = model_of(config)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    train(adapted)
    trained, before = logits(adapted), bits(adapted)
    adapted.merge_adapter()
    layer = adapted.base_model.model.model.embed_tokens
    assert isinstance(layer.base_layer, QuantEmbedding)
    # The scales of rows of an 8-bit embedding leave little to lose.
    assert float(layer.base_layer.relative_errors["weight"]) < 0.01
    assert (logits(adapted) - trained).norm() < 0.2 * trained.norm()
    adapted.unmerge_adapter()
    assert same(before, bits(adapted))


def test_kbit_preparation_leaves_codes_alone_and_tells_what_it_cast(
    checkpoint: Callable[..., Path], load: Callable[..., Any]
) -> None:
    config = fewbits.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"
    )
    model = load(checkpoint("llama"), config, dtype=torch.bfloat16)
    before, output = bits(model), logits(model)
    assert peft.prepare_model_for_kbit_training(model) is model
    for name, tensor in model.state_dict().items():
        if "_proj" in name:
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
        else:
            assert tensor.dtype == torch.float32, name
    adapted = get_peft_model(model, LoraConfig(r=4, **ALL_LINEAR))
    assert (logits(adapted).float() - output.float()).norm() < 0.03 * output.float().norm()
    notes = {entry.name: entry.note for entry in fewbits.report(adapted).entries if entry.note}
    assert set(notes.values()) == {"cast from bfloat16 by prepare_model_for_kbit_training"}
    assert {name.removeprefix("base_model.model.") for name in notes} == {
        name for name in before if "_proj" not in name
    }
    adapter = next(one for one in fewbits.report(adapted).entries if "lora_A" in one.name)
    assert adapter.reason == "an adapter"


def test_plain_models_are_peft_s_own_affair(new_model: Callable[..., Any]) -> None:
    model = new_model("llama").bfloat16()
    peft.prepare_model_for_kbit_training(model)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=4, **ALL_LINEAR))
    assert type(adapted.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear


FROM_PEFT = "from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training\n"
ORDERS = {
    "fewbits_first": "import fewbits\n" + FROM_PEFT,
    "peft_first": FROM_PEFT + "import fewbits\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_imports_in_either_order(order: str, python: Callable[..., str], demo_model: Path) -> None:
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
import peft.tuners.lora.model, peft.tuners.vera.layer, peft.tuners.lora.dora
config = fewbits.FewbitsConfig("nf4:g64")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model = prepare_model_for_kbit_training(model)
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
backend = peft.tuners.vera.layer.resolve_quantization_backend(layer.base_layer)
print(type(layer).__module__, type(backend).__module__)
print(model.is_gradient_checkpointing, model.lm_head.weight.dtype)
"""
    words = python(ORDERS[order] + script, demo_model).split()
    assert words[-4:] == ["fewbits.integrations.peft_merging"] * 2 + ["True", "torch.float32"]


# --- LoftQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "model", "state_dict"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loftq_starts_nearer_to_the_original(
    source: str,
    kind: str,
    checkpoint: Callable[..., Path],
    load: Callable[..., Any],
    model_of: Callable[..., Any],
) -> None:
    original = load(checkpoint(kind))
    originals = {"folder": checkpoint(kind), "model": original, "state_dict": original.state_dict()}
    model = model_of("nf4:g64", kind)
    wanted = logits(original)
    plain = (logits(model) - wanted).norm()
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=8, **ALL_LINEAR))
    errors = fewbits.integrations.peft.initialize_loftq(adapted, originals[source], iterations=2)
    assert len(errors) == sum(isinstance(module, LoraLinear) for module in adapted.modules())
    assert all(min(one) < one[0] for one in errors.values())
    assert (logits(adapted) - wanted).norm() < 0.85 * plain
    assert "LoftQ" in next(one for one in fewbits.report(adapted).quantized).note


def test_loftq_says_what_it_cannot_do(
    model_of: Callable[..., Any], checkpoint: Callable[..., Path], load: Callable[..., Any]
) -> None:
    loftq = fewbits.integrations.peft.initialize_loftq
    with pytest.raises(ValueError, match="initialize_loftq"):
        get_peft_model(
            model_of(),
            LoraConfig(r=4, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}, **ALL_LINEAR),
        )
    dora = get_peft_model(model_of(), LoraConfig(r=4, use_dora=True, **ALL_LINEAR))
    with pytest.raises(ValueError, match="DoRA"):
        loftq(dora, checkpoint("llama"))
    adapted = get_peft_model(model_of(), LoraConfig(r=4, **ALL_LINEAR))
    before = bits(adapted)
    with pytest.raises(ValueError, match="has an adapter 'other'"):
        loftq(adapted, checkpoint("llama"), adapter_name="other")
    with pytest.raises(ValueError, match=r"have no model\.layers\.0\.self_attn\.q_proj\.weight"):
        loftq(adapted, checkpoint("gpt2"))
    wrong = {name: tensor[:8] for name, tensor in load(checkpoint("llama")).state_dict().items()}
    with pytest.raises(ValueError, match="not its weight"):
        loftq(adapted, wrong)
    assert same(before, bits(adapted))

"""Where merging meets something else: other layers with the same codes, dequantizing, errors, pickles."""

from __future__ import annotations

import pickle
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
from fewbits.nn import QuantLinear

ALL_LINEAR = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
QUERIES = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomize(model: nn.Module, scale: float = 0.05) -> None:
    for name, parameter in model.named_parameters():
        if any(kind in name for kind in ("lora_", "oft_", "vera_lambda")):
            parameter.data.normal_(0, scale)


def bits(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    kinds = ("lora", "oft", "vera")
    return {name: value.clone() for name, value in state if not any(kind in name for kind in kinds)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def query(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].self_attn.q_proj


# --- others change the same codes -------------------------------------------------------------------


def test_tied_layers_with_an_adapter_each(model_of: Callable[..., Any], run: Callable[..., Tensor]) -> None:
    config = FewbitsConfig("int8:row", {"embed_tokens": "int8:row", "lm_head": "int8:row"})
    adapted = get_peft_model(
        model_of(config, "llama_tied"), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
    )
    randomize(adapted)
    before = bits(adapted)
    adapted.merge_adapter()
    table = adapted.base_model.model.model.embed_tokens.base_layer.dequantize().float()
    adapted.unmerge_adapter()
    # One of the two was rounded after the other, so nothing can be exact; neither adapter is left behind.
    after = adapted.base_model.model.model.embed_tokens.base_layer.dequantize().float()
    adapted.load_state_dict(before, strict=False)
    first = adapted.base_model.model.model.embed_tokens.base_layer.dequantize().float()
    assert (after - first).norm() < 0.02 * first.norm()
    assert (after - first).norm() < 0.2 * (table - first).norm()


def test_another_change_of_the_codes_is_kept(model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of("int8:row"), LoraConfig(r=4, **QUERIES))
    adapted.add_adapter("second", LoraConfig(r=4, **QUERIES))
    randomize(adapted)
    layer = query(adapted)
    first = layer.base_layer.dequantize()
    layer.merge(adapter_names=["default"])
    other = torch.randn_like(first) * 0.1
    layer.base_layer.overwrite(fewbits.quantize(layer.base_layer.dequantize() + other, "int8:row"))
    layer.merge(adapter_names=["second"])
    wanted = first + other + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert (layer.base_layer.dequantize() - wanted).norm() < 0.02 * wanted.norm()
    layer.unmerge()
    assert layer.merged_adapters == []
    assert (layer.base_layer.dequantize() - first - other).norm() < 0.02 * first.norm()
    assert layer.base_layer.notes["weight"] == "unmerged and rounded again"


def test_a_dequantized_base_merges_as_plain_layers_do(
    model_of: Callable[..., Any], run: Callable[..., Tensor]
) -> None:
    adapted = get_peft_model(model_of("nf4:g64"), LoraConfig(r=4, **ALL_LINEAR))
    randomize(adapted)
    adapted.eval()
    trained = run(adapted)
    adapted.get_base_model().dequantize()
    adapted.merge_adapter()
    assert not isinstance(query(adapted).base_layer, QuantLinear)
    assert torch.allclose(run(adapted), trained, atol=1e-3)
    adapted.unmerge_adapter()
    assert torch.allclose(run(adapted), trained, atol=1e-3)


# --- what is restored -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "pissa"])
def test_the_report_is_restored_by_unmerging(init: Any, model_of: Callable[..., Any]) -> None:
    adapted = get_peft_model(model_of(), LoraConfig(r=4, init_lora_weights=init, **ALL_LINEAR))
    randomize(adapted)
    before = {one.name: (one.relative_error, one.note) for one in fewbits.report(adapted).quantized}
    adapted.merge_adapter()
    assert before != {one.name: (one.relative_error, one.note) for one in fewbits.report(adapted).quantized}
    adapted.unmerge_adapter()
    assert before == {one.name: (one.relative_error, one.note) for one in fewbits.report(adapted).quantized}


def test_two_adapters_of_a_method_with_a_backend_round_once(model_of: Callable[..., Any]) -> None:
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model_of(), config)
    adapted.add_adapter("second", config)
    randomize(adapted, 0.5)
    layer, before = query(adapted), bits(adapted)
    first = layer.base_layer.quantized_weight().dequantize(torch.float32)
    whole = first + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert layer.base_layer.quantized_weight() == fewbits.quantize(whole, "nf4:g64:dq")
    assert "merged default, second" in layer.base_layer.notes["weight"]
    layer.unmerge()
    assert same(before, bits(adapted))


def test_after_a_merge_that_failed_another_one_counts(model_of: Callable[..., Any]) -> None:
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model_of(), config)
    adapted.add_adapter("good", config)
    randomize(adapted, 0.5)
    layer, before = query(adapted), bits(adapted)
    with torch.no_grad():
        layer.vera_lambda_b["default"][3] = torch.inf
    with pytest.raises(ValueError, match="the changed weight"):
        layer.merge(adapter_names=["default"])
    assert same(before, bits(adapted))
    layer.merge(adapter_names=["good"])
    assert not same(before, bits(adapted))


def test_a_merged_copy_and_a_pickle_unmerge_exactly(model_of: Callable[..., Any]) -> None:
    for config in (LoraConfig(r=4, **QUERIES), peft.IA3Config(feedforward_modules=[], **QUERIES)):
        adapted = get_peft_model(model_of(), config)
        before = bits(adapted)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "ia3" in name:
                    parameter.add_(0.1)
        learned = bits(adapted)
        adapted.merge_adapter()
        again = pickle.loads(pickle.dumps(adapted))
        assert same(bits(adapted), bits(again))
        again.unmerge_adapter()
        assert same(learned, bits(again))
        assert before.keys() == learned.keys()


def test_layers_of_custom_classes_merge(model_of: Callable[..., Any]) -> None:
    kind = type("Mine", (peft.tuners.lora.Linear,), {"__module__": "mine"})
    config = LoraConfig(r=4, **QUERIES)
    config._register_custom_module({QuantLinear: kind})
    adapted = get_peft_model(model_of(), config)
    randomize(adapted)
    before = bits(adapted)
    adapted.merge_adapter()
    assert not same(before, bits(adapted))
    adapted.unmerge_adapter()
    assert same(before, bits(adapted))


# --- other kinds of layers --------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_lora_over_a_trainable_conv1d_merges_the_right_way_round(
    dora: bool, checkpoint: Callable[..., Path], load: Callable[..., Any], run: Callable[..., Tensor]
) -> None:
    config = fewbits.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    model = load(checkpoint("gpt2"), config)
    adapted = get_peft_model(model, LoraConfig(r=4, use_dora=dora, **ALL_LINEAR))
    randomize(adapted)
    adapted.eval()
    trained = run(adapted)
    adapted.merge_adapter()
    assert (run(adapted) - trained).norm() < 0.03 * trained.norm()


def test_preparing_trainable_int8_layers_is_told(
    checkpoint: Callable[..., Path], load: Callable[..., Any]
) -> None:
    config = fewbits.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    model = load(checkpoint("llama", torch.bfloat16), config, dtype=torch.bfloat16)
    peft.prepare_model_for_kbit_training(model)
    entries = fewbits.report(model).entries
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(one.note == "cast from bfloat16 by prepare_model_for_kbit_training" for one in entries)


def test_experts_merged_in_inference_mode_train_afterwards(model_of: Callable[..., Any]) -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(
        model_of("nf4:g32", "mixtral"), LoraConfig(r=4, target_modules=[], target_parameters=names)
    )
    randomize(adapted)
    before = bits(adapted)
    with torch.inference_mode():
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    assert same(before, bits(adapted))
    ids = torch.arange(12).reshape(2, 6) + 2
    adapted(input_ids=ids, labels=ids).loss.backward()


def test_offloaded_adapters_over_experts_are_an_error(model_of: Callable[..., Any]) -> None:
    import accelerate

    adapted = get_peft_model(
        model_of("int8:row", "mixtral"),
        LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"]),
    )
    accelerate.cpu_offload(adapted, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        adapted(input_ids=torch.arange(6)[None] + 2)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
def test_initialisations_of_offloaded_layers_are_an_error(init: str, model_of: Callable[..., Any]) -> None:
    import accelerate

    model = model_of("int8:row")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        get_peft_model(model, LoraConfig(r=4, init_lora_weights=init, **QUERIES))


# --- refusals and the report ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=str
)
def test_codes_are_not_trained_whole(more: dict[str, Any], model_of: Callable[..., Any]) -> None:
    model = model_of(FewbitsConfig("nf4:g64", {"lm_head": "int8:row", "embed_tokens": "int8:row"}))
    with pytest.raises(ValueError, match="its codes cannot be trained"):
        get_peft_model(model, LoraConfig(r=4, **QUERIES, **more))


def test_a_refused_adapter_leaves_the_model_as_it_was(
    model_of: Callable[..., Any], run: Callable[..., Tensor]
) -> None:
    model = model_of()
    before, names = run(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="computes with the weights"):
        get_peft_model(model, peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    assert names == [name for name, _ in model.named_modules()]
    assert torch.equal(run(model), before)


def test_the_report_knows_whole_copies_and_other_adapters(model_of: Callable[..., Any]) -> None:
    model = model_of("nf4:g64", dtype=torch.bfloat16)
    peft.prepare_model_for_kbit_training(model)
    adapted = get_peft_model(model, LoraConfig(r=4, use_dora=True, modules_to_save=["lm_head"], **QUERIES))
    entries = {one.name.removeprefix("base_model.model."): one for one in fewbits.report(adapted).entries}
    head = entries["lm_head.original_module.weight"]
    assert head.reason == "the last layer"
    assert head.note == "cast from bfloat16 by prepare_model_for_kbit_training"
    assert entries["lm_head.modules_to_save.default.weight"].reason == "an adapter"
    place = "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"
    assert entries[place].reason == "an adapter"
    vera = get_peft_model(model_of(), peft.VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    kept = {one.name: one.reason for one in fewbits.report(vera).kept}
    assert {why for name, why in kept.items() if "vera_lambda" in name} == {"an adapter"}


def test_loftq_is_saved_with_its_codes(
    model_of: Callable[..., Any], checkpoint: Callable[..., Path], load: Callable[..., Any], tmp_path: Path,
    run: Callable[..., Tensor],
) -> None:  # fmt: skip
    adapted = get_peft_model(model_of("nf4:g64"), LoraConfig(r=8, **ALL_LINEAR))
    fewbits.integrations.peft.initialize_loftq(adapted, checkpoint("llama"), iterations=2)
    layer = query(adapted).base_layer
    exact = load(checkpoint("llama")).model.layers[0].self_attn.q_proj.weight.detach()
    lost = (exact - layer.dequantize()).norm() / exact.norm()
    assert layer.relative_errors["weight"] == pytest.approx(float(lost), rel=1e-4)
    wanted = run(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(run(again), wanted)


def test_looking_for_a_module_does_not_lose_its_registration(python: Callable[..., str]) -> None:
    script = """
import importlib.util, fewbits
fewbits.enable(True)
importlib.util.find_spec("transformers.trainer_optimizer")
from transformers import trainer_optimizer
print(trainer_optimizer._OPTIMIZER_HANDLERS["adamw_8bit"].__module__)
"""
    assert python(script).split()[-1] == "fewbits.integrations.trainer"

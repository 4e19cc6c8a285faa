"""`llm_int8_has_fp16_weight=True` through transformers, and adapters over frozen int8 weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fewbits
from fewbits.int8_training import TrainableInt8Linear, freeze
from fewbits.nn import QuantLinear

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
CLASSES = (transformers.BitsAndBytesConfig, fewbits.BitsAndBytesConfig)
# kind → how many of its layers are trained through LLM.int8()
KINDS = {"llama": 14, "llama_bias": 14, "llama_tied": 14, "gpt2": 8, "opt": 12, "mixtral": 8, "t5": 28}


def training(**options: Any) -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True, **options)


def trained_layers(model: nn.Module) -> dict[str, TrainableInt8Linear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, TrainableInt8Linear)}


def batches(count: int) -> list[Tensor]:
    """Sentences that count up in steps of one to four; a model learns them in a few steps."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(2, 40, (count, 8, 1), generator=generator)
    strides = torch.randint(1, 5, (count, 8, 1), generator=generator)
    return list((starts + strides * torch.arange(12)) % 94 + 2)


def train(model: Any, steps: int = 25, rate: float = 3e-3) -> list[float]:
    torch.manual_seed(0)  # of dropout
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for ids in batches(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


class TestLoading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_layers_train_their_weights_and_compute_as_frozen_ones(
        self, kind: str, checkpoint: Checkpoint, load: Load, run: Run
    ) -> None:
        path = checkpoint(kind)
        model, plain = load(path, training()), load(path)
        assert len(trained_layers(model)) == KINDS[kind]
        assert all(parameter.requires_grad for parameter in model.parameters())
        state = plain.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        experts = ["experts"] if kind == "mixtral" else []  # bitsandbytes keeps them, fewbits does not
        frozen = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=experts)
        assert torch.equal(run(model), run(load(path, frozen)))
        evaluated = run(model)
        for layer in trained_layers(model).values():  # not the whole model, which may have dropout
            layer.train()
        assert torch.equal(run(model), evaluated)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("config_class", CLASSES)
    def test_weights_have_the_dtype_of_the_model_and_the_report_tells_both(
        self, config_class: Any, dtype: torch.dtype, checkpoint: Checkpoint, load: Load
    ) -> None:
        config = config_class(load_in_8bit=True, llm_int8_has_fp16_weight=True, llm_int8_threshold=5.5)
        model = load(checkpoint("llama"), config, dtype=dtype)
        assert {layer.weight.dtype for layer in trained_layers(model).values()} == {dtype}
        stored = {entry.stored for entry in fewbits.report(model).quantized}
        assert stored == {f"{str(dtype).removeprefix('torch.')}, multiplied as int8:row@int8:t5.5"}

    def test_the_threshold_and_the_skipped_modules_are_honoured(
        self, checkpoint: Checkpoint, load: Load, run: Run
    ) -> None:
        path = checkpoint("llama")
        model = load(path, training(llm_int8_threshold=0.0, llm_int8_skip_modules=["down_proj"]))
        assert not any("down_proj" in name for name in trained_layers(model))
        assert {str(layer.scheme) for layer in trained_layers(model).values()} == {"int8:row@int8"}
        with_outliers = load(path, training(llm_int8_threshold=1.0, llm_int8_skip_modules=["down_proj"]))
        assert not torch.equal(run(model), run(with_outliers))

    @pytest.mark.filterwarnings("ignore:.*no effect with:UserWarning")
    @pytest.mark.parametrize("config_class", CLASSES)
    def test_4_bit_weights_are_frozen_whatever_the_option_says(
        self, config_class: Any, checkpoint: Checkpoint, load: Load
    ) -> None:
        model = load(checkpoint("llama"), config_class(load_in_4bit=True, llm_int8_has_fp16_weight=True))
        assert not trained_layers(model)
        assert not model.hf_quantizer.is_qat_trainable

    def test_experts_are_trained_as_they_are_and_the_report_says_so(
        self, checkpoint: Checkpoint, load: Load
    ) -> None:
        model = load(checkpoint("mixtral"), training())
        kept = {entry.name: entry.reason for entry in fewbits.report(model).kept}
        reason = kept["model.layers.0.mlp.experts.gate_up_proj"]
        assert reason == "trained as it is: LLM.int8() trains linear layers only"


class TestTraining:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_loss_falls_as_that_of_plain_training(
        self, dtype: torch.dtype, checkpoint: Checkpoint, load: Load
    ) -> None:
        path = checkpoint("llama")
        plain = train(load(path, dtype=dtype))
        mine = train(load(path, training(), dtype=dtype))
        assert plain[-1] < 0.6 * plain[0], "plain training learns nothing here"
        assert abs(mine[-1] - plain[-1]) < 0.05 * plain[-1], (mine[-1], plain[-1])
        assert mine != plain

    @pytest.mark.parametrize("kind", ["gpt2", "t5", "mixtral"])
    def test_every_weight_gets_a_gradient(self, kind: str, checkpoint: Checkpoint, load: Load) -> None:
        model = load(checkpoint(kind), training()).train()
        ids = batches(1)[0]
        model(input_ids=ids, labels=ids).loss.backward()
        layers = trained_layers(model)
        assert all(one.weight.grad is not None and one.weight.grad.abs().sum() > 0 for one in layers.values())
        assert {type(one.plain()) for one in layers.values()} == {Conv1D if kind == "gpt2" else nn.Linear}

    def test_gradient_checkpointing_changes_no_gradient(self, checkpoint: Checkpoint, load: Load) -> None:
        gradients = []
        for recompute in (False, True):
            model = load(checkpoint("llama"), training()).train()
            if recompute:
                model.gradient_checkpointing_enable()
            ids = batches(1)[0]
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_trainer_tunes_it_whole_and_refuses_it_once_frozen(
        self, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        model = load(checkpoint("llama"), training())
        examples = [{"input_ids": ids, "labels": ids} for batch in batches(12) for ids in batch]
        arguments = transformers.TrainingArguments(
            tmp_path / "run",
            per_device_train_batch_size=8,
            max_steps=12,
            learning_rate=3e-3,
            logging_steps=1,
            save_steps=12,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        before = {name: layer.weight.detach().clone() for name, layer in trained_layers(model).items()}
        trainer = transformers.Trainer(model, arguments, train_dataset=examples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0], losses
        layers = trained_layers(model)
        assert not any(torch.equal(before[name], layer.weight) for name, layer in layers.items())
        again = load(tmp_path / "run" / "checkpoint-12")
        assert torch.equal(run(again), run(model.eval()))
        freeze(model)
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.Trainer(model, arguments, train_dataset=examples)


class TestSaving:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
    def test_the_weights_as_trained(
        self,
        kind: str,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        same_tensors: Callable[[Path, Path], None],
        tmp_path: Path,
    ) -> None:
        """The tensors of a plain checkpoint; reloaded, the same model, still to be trained."""
        model, plain = load(checkpoint(kind), training()), load(checkpoint(kind))
        train(model, 2)
        plain.load_state_dict(model.state_dict())
        model.save_pretrained(tmp_path / "mine", max_shard_size="100KB")
        plain.save_pretrained(tmp_path / "plain")
        same_tensors(tmp_path / "mine", tmp_path / "plain")
        again = load(tmp_path / "mine")
        assert trained_layers(again).keys() == trained_layers(model).keys()
        assert all(parameter.requires_grad for parameter in again.parameters())
        assert torch.equal(run(again), run(model))
        assert again.hf_quantizer.is_qat_trainable
        assert train(again, 2) == train(model, 2)

    @pytest.mark.parametrize("kind", ["llama", "llama_bias", "gpt2", "mixtral"])
    def test_frozen_it_is_the_int8_checkpoint_of_the_trained_weights(
        self,
        kind: str,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        same_tensors: Callable[[Path, Path], None],
        tmp_path: Path,
    ) -> None:
        model = load(checkpoint(kind), training())
        train(model, 2)
        model.save_pretrained(tmp_path / "trained")
        logits = run(model)
        freeze(model)
        assert torch.equal(run(model), logits)
        model.save_pretrained(tmp_path / "mine")
        settings = json.loads((tmp_path / "mine" / "config.json").read_text())["quantization_config"]
        assert settings["llm_int8_has_fp16_weight"] is False
        again = load(tmp_path / "mine")
        assert torch.equal(run(again), logits)
        assert not trained_layers(again)
        assert not again.hf_quantizer.is_qat_trainable
        if kind != "mixtral":  # whose experts a plain int8 load quantizes as well
            plain = load(tmp_path / "trained").dequantize()
            plain.save_pretrained(tmp_path / "plain")
            config = transformers.BitsAndBytesConfig(load_in_8bit=True)
            load(tmp_path / "plain", config).save_pretrained(tmp_path / "wanted")
            same_tensors(tmp_path / "mine", tmp_path / "wanted")

    def test_int8_weights_stay_frozen_whatever_the_config_says(
        self, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        model = load(checkpoint("llama"), transformers.BitsAndBytesConfig(load_in_8bit=True))
        model.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["quantization_config"]["llm_int8_has_fp16_weight"] = True
        (tmp_path / "config.json").write_text(json.dumps(settings))
        again = load(tmp_path)
        assert torch.equal(run(again), run(model))
        assert not trained_layers(again)
        assert not again.hf_quantizer.is_qat_trainable
        assert again.config.quantization_config.llm_int8_has_fp16_weight is False

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_dequantizing_gives_the_trained_weights_back(
        self, kind: str, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        model = load(checkpoint(kind), training(), dtype=torch.bfloat16)
        train(model, 1)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plain = model.dequantize()
        assert not trained_layers(plain)
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
        plain.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(run(load(tmp_path, dtype=torch.bfloat16)), run(plain))


# --- adapters over frozen weights -------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_over_frozen_int8_weights_get_the_gradients_of_the_formulas(
    dtype: torch.dtype, lead: Sequence[int], threshold: float
) -> None:
    """y = LLM.int8()(x) + 2·x·Aᵀ·Bᵀ: the gradient of x is g·decode(W) + 2·g·B·A, that of A 2·(g·B)ᵀ·x."""
    base = nn.Sequential(nn.Linear(65, 11, dtype=dtype))
    config = fewbits.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    fewbits.quantize_model(base, config)
    layer = base[0]
    assert isinstance(layer, QuantLinear)
    decoded = layer.dequantize().double()
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    parameters = {name: one for name, one in model.named_parameters() if "lora_" in name}
    (name_a, A), (name_b, B) = sorted(parameters.items())
    assert "lora_A" in name_a
    assert "lora_B" in name_b
    nn.init.normal_(B)
    x = torch.randn(*lead, 65).to(dtype)
    x[..., 3] *= 20
    x.requires_grad_()
    grad = torch.randn(*lead, 11).to(dtype)
    y = model(x)
    y.backward(grad)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), y)
        assert torch.equal(model.train()(x), y)
    g, rows = grad.double().reshape(-1, 11), x.detach().double().reshape(-1, 65)
    a, b = A.detach().double(), B.detach().double()
    wanted = {
        "x": (x.grad, g @ decoded + 2 * g @ b @ a),
        "A": (A.grad, 2 * (g @ b).T @ rows),
        "B": (B.grad, 2 * g.T @ (rows @ a.T)),
    }
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, (mine, truth) in wanted.items():
        error = (mine.double().reshape(truth.shape) - truth).norm() / truth.norm()
        assert error < tolerance, (name, float(error))
    assert all(one.grad is None for name, one in model.named_parameters() if name not in parameters)


def test_adapters_over_a_frozen_int8_model_learn_as_over_its_dequantized_one(
    checkpoint: Checkpoint, load: Load
) -> None:
    losses = []
    for decode in (False, True):
        model = load(checkpoint("llama"), transformers.BitsAndBytesConfig(load_in_8bit=True))
        base = model.dequantize() if decode else model
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        losses.append(train(peft.get_peft_model(base, config), 15, rate=2e-2))
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert abs(losses[0][-1] - losses[1][-1]) < 0.05 * losses[1][-1], losses

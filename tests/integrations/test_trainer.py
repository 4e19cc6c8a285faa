"""Trainer with optimizers of fewbits: by class, and by the names that scripts give bitsandbytes'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainingArguments, trainer_optimizer

import fewbits
from fewbits import optim
from fewbits.optim import BlockwiseOptimizer

NAMES = {
    "adamw_bnb_8bit": optim.AdamW8bit,
    "adamw_8bit": optim.AdamW8bit,
    "paged_adamw_8bit": optim.PagedAdamW8bit,
    "paged_adamw_32bit": optim.PagedAdamW32bit,
    "lion_8bit": optim.Lion8bit,
    "lion_32bit": optim.Lion32bit,
    "paged_lion_8bit": optim.PagedLion8bit,
    "paged_lion_32bit": optim.PagedLion32bit,
}


def samples(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 90, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return TrainingArguments(**{**options, **changed})


def model_at(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def inner(trainer: Trainer) -> BlockwiseOptimizer:
    """The optimizer within accelerate's wrapper."""
    found = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(found, BlockwiseOptimizer)
    return found


def weights(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_bitsandbytes_mean_these_optimizers(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options = {
        "optim": name,
        "adam_beta1": 0.8,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.02,
    }
    trainer = Trainer(model_at(checkpoint("llama")), arguments(tmp_path, **options), train_dataset=samples())
    made = trainer.create_optimizer()
    assert type(made) is NAMES[name]
    groups = made.param_groups
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    assert all(group["betas"] == (0.8, 0.98) for group in groups)
    assert all(group["lr"] == 1e-3 for group in groups)
    assert "eps" not in groups[0] if "lion" in name else groups[0]["eps"] == 1e-7


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "lion_8bit"])
def test_trainer_trains_saves_and_resumes(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Three steps in one run, or two, a checkpoint and one more: the same weights."""
    path = checkpoint("llama")
    options = {"optim": name, "max_steps": 3, "lr_scheduler_type": "constant"}

    def trainer(folder: str, **changed: Any) -> Trainer:
        transformers.set_seed(0)
        made = arguments(tmp_path / folder, **{**options, **changed})
        return Trainer(model_at(path), made, train_dataset=samples())

    whole = trainer("whole")
    before = weights(whole.model)
    whole.train()
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(whole.model), strict=True))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert inner(whole).memory().in_8bit > 0
    trainer("parts", max_steps=2, save_strategy="steps", save_steps=2).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(resumed.model), strict=True))


def test_states_of_embeddings_stay_in_32_bits(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = model_at(checkpoint("llama"))
    trainer = Trainer(
        model, arguments(tmp_path, optim="adamw_bnb_8bit", max_steps=1), train_dataset=samples()
    )
    trainer.train()
    states = inner(trainer).state
    assert states[model.get_input_embeddings().weight]["exp_avg"].dtype == torch.float32
    assert states[model.model.layers[0].mlp.down_proj.weight]["exp_avg"].dtype == torch.uint8


def test_any_of_them_by_class(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    chosen = (optim.AdamW8bit, {"lr": 2e-3, "min_8bit_size": 0})
    trainer = Trainer(
        model_at(checkpoint("llama")),
        arguments(tmp_path),
        train_dataset=samples(),
        optimizer_cls_and_kwargs=chosen,
    )
    trainer.train()
    memory = inner(trainer).memory()
    assert memory.in_8bit == memory.parameters > 0


@pytest.mark.parity
def test_the_table_goes_back_and_forth_and_other_names_are_left_alone() -> None:
    table = trainer_optimizer._OPTIMIZER_HANDLERS
    theirs = "_get_bitsandbytes_optimizer"
    others = {"rmsprop_bnb_8bit", "ademamix_8bit", "paged_ademamix_32bit"}
    for asked, ours in ((True, True), (False, False), (True, True), (None, False)):
        fewbits.enable(asked)
        for name in NAMES:
            assert (table[name].__module__ == "fewbits.integrations.trainer") == ours, name
            assert ours or table[name].__name__ == theirs
        assert all(table[name].__name__ == theirs for name in others)


# A script as found with QLoRA, unchanged but for the import of fewbits.
SCRIPT = """
import json, sys
import importlib.util
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

assert importlib.util.find_spec("bitsandbytes") is None
path, folder, name = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
rows = [{"input_ids": t, "labels": t} for t in torch.randint(0, 90, (8, 12))]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=folder, optim=name, max_steps=2, per_device_train_batch_size=2, learning_rate=2e-4,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=rows,
)
trainer.train()
print(json.dumps({"class": type(trainer.optimizer.optimizer).__name__, "step": trainer.state.global_step}))
"""


@pytest.mark.parametrize(
    "first",
    [
        "import fewbits\n",
        pytest.param("import transformers.trainer\nimport fewbits\n", marks=pytest.mark.slow),
    ],
    ids=["fewbits_first", "trainer_first"],
)
def test_a_qlora_script_runs_without_bitsandbytes(
    first: str,
    python: Callable[..., str],
    without_bitsandbytes: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    printed = python(
        first + SCRIPT, checkpoint("llama"), tmp_path, "paged_adamw_8bit", packages=without_bitsandbytes
    )
    assert json.loads(printed.splitlines()[-1]) == {"class": "PagedAdamW8bit", "step": 2}

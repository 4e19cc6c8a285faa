"""What users have, unchanged: QLoRA with PEFT, transformers' Trainer and trl, without bitsandbytes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

START = """
import importlib.util, json, sys, warnings
warnings.simplefilter("ignore")
import fewbits
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForLanguageModeling, Trainer,
    TrainingArguments,
)

assert importlib.util.find_spec("bitsandbytes") is None
path, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = [f"Once upon a time there was a cat named Tom. He had {n} hats. " for n in range(16)]
peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")

def load(dtype, **how):
    how = how or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                  "bnb_4bit_compute_dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map="auto", quantization_config=BitsAndBytesConfig(**how))

def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
"""

TRAINER = """
def run(model, out, **more):
    arguments = TrainingArguments(
        out, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, **more)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, data_collator=collator,
                      train_dataset=[tokenizer(text) for text in texts])
    trainer.train()
    return trainer

found = {}
for dtype in (torch.bfloat16, torch.float32):
    for reentrant in (True, False):
        kwargs = {"use_reentrant": reentrant}
        model = prepare_model_for_kbit_training(load(dtype), gradient_checkpointing_kwargs=kwargs)
        model = get_peft_model(model, peft_config)
        trainer = run(model, folder, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs,
                      bf16=dtype == torch.bfloat16)
        found[f"{dtype} {reentrant}"] = losses(trainer)
model = get_peft_model(prepare_model_for_kbit_training(load(torch.bfloat16, load_in_8bit=True)), peft_config)
found["int8"] = losses(run(model, folder))
model.save_pretrained(folder)
again = PeftModel.from_pretrained(load(torch.bfloat16, load_in_8bit=True), folder)
again = prepare_model_for_kbit_training(again)
ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
with torch.no_grad():
    found["same"] = torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
    again.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    again.set_adapter("second")
    with again.disable_adapter():
        found["tokens"] = again.generate(ids, max_new_tokens=4, do_sample=False).shape[1] - ids.shape[1]
print(json.dumps(found))
"""

SFT = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model=load(torch.bfloat16),
    args=SFTConfig(folder, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
                   report_to=[], save_strategy="no", max_length=64, disable_tqdm=True, use_cpu=True,
                   optim="paged_adamw_8bit"),
    train_dataset=Dataset.from_dict({"text": texts}),
    peft_config=peft_config,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(folder)
from safetensors.torch import load_file
stored = load_file(f"{folder}/adapter_model.safetensors")
model = PeftModel.from_pretrained(load(torch.bfloat16), folder)
loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora" in name}
print(json.dumps({
    "losses": losses(trainer),
    "same": all(torch.equal(stored[name].float(), loaded[name].float()) for name in stored),
    "layers": sum("lora_A" in name for name in stored),
    "layer": type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__,
}))
"""


def test_kbit_preparation_and_trainer(
    python: Callable[..., str], without_bitsandbytes: Path, demo_model: Path, tmp_path: Path
) -> None:
    printed = python(START + TRAINER, demo_model, tmp_path, packages=without_bitsandbytes)
    found = json.loads(printed.splitlines()[-1])
    assert found.pop("same")
    assert found.pop("tokens") == 4
    assert len(found) == 5
    for name, losses in found.items():
        assert losses[-1] < 0.75 * losses[0], name
        assert losses == pytest.approx(found["torch.float32 False"], rel=0.15), name


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_sft_trainer(
    python: Callable[..., str], without_bitsandbytes: Path, demo_model: Path, tmp_path: Path
) -> None:
    printed = python(START + SFT, demo_model, tmp_path, packages=without_bitsandbytes)
    found = json.loads(printed.splitlines()[-1])
    assert found["losses"][-1] < 0.75 * found["losses"][0]
    assert found["same"]
    assert found["layers"] == 28
    assert found["layer"] == "fewbits.integrations.peft_merging"

"""Fine-tune the small model of this repository in NF4, on text that this script makes, and compare with
full-precision LoRA at the same seed.

    python examples/qlora.py --out build/qlora

Writes OUT/adapter (of PEFT), OUT/merged (16-bit weights with the adapter in them), OUT/loss.png and
OUT/result.json. Needs `pip install 'fewbits[train,report]'`; no network, no accelerator.
"""

import argparse
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import fewbits

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
MODEL = Path(__file__).parents[1] / "demo" / "model"
ANIMALS = ["fox", "owl", "bear", "frog", "mouse", "duck", "goat", "crab", "bee", "cat"]
PLACES = [
    "by the lake",
    "in the barn",
    "under the bridge",
    "on the hill",
    "near the old mill",
    "in the garden",
]
THINGS = ["a red kite", "a small boat", "a silver bell", "a warm hat", "a round stone", "a long rope"]
ENDINGS = ["shared it with everyone", "gave it to a friend", "kept it safe", "painted it blue"]


def letters(count: int, seed: int) -> list[str]:
    """Short letters, all in one form that the model has never seen."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        sender, reader = draw.sample(ANIMALS, 2)
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        made.append(
            f"Dear {reader}, today I was {place} and I found {thing}. I {draw.choice(ENDINGS)}. "
            f"Come and see me {draw.choice(PLACES)} soon. Your friend, the {sender}."
        )
    return made


def load(config: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, quantization_config=config)


def train(
    model: PreTrainedModel, data: list, collator: DataCollatorForLanguageModeling, options: argparse.Namespace
) -> tuple[PeftModel, list[float]]:
    """The model with a trained adapter, and the loss of every step."""
    torch.manual_seed(options.seed)  # the same adapter at the start
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(get_peft_model(model, lora), arguments, train_dataset=data, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def loss_of(model: torch.nn.Module, held_out: list, collator: DataCollatorForLanguageModeling) -> float:
    """Mean cross-entropy per token, in nats, on letters that no model was trained on."""
    batch = collator(held_out).to(next(model.parameters()).device)
    return model.eval()(**batch).loss.item()


def draw(curves: dict[str, list[float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=f"LoRA on {name}", linewidth=1.5)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/qlora"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fewbits.enable(takeover=True)  # also where bitsandbytes is installed

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data, held_out = (
        [tokenizer(text) for text in letters(*one)] for one in ((8 * options.steps, 1), (64, 2))
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    adapter, merged_folder = options.out / "adapter", options.out / "merged"

    losses = {
        "bfloat16, before": loss_of(load(), held_out, collator),
        "NF4, before": loss_of(load(NF4), held_out, collator),
    }
    plain, plain_curve = train(load(), data, collator, options)
    losses["bfloat16, trained"] = loss_of(plain, held_out, collator)
    model, curve = train(prepare_model_for_kbit_training(load(NF4)), data, collator, options)
    losses["NF4, trained"] = loss_of(model, held_out, collator)
    print(fewbits.report(model).summary)
    model.save_pretrained(adapter)

    # The adapter of the NF4 model again: on fresh NF4 weights, rounded into them, and in 16-bit weights.
    again = PeftModel.from_pretrained(load(NF4), adapter)
    losses["NF4, adapter reloaded"] = loss_of(again, held_out, collator)
    losses["merged into NF4"] = loss_of(again.merge_and_unload(), held_out, collator)
    merged = PeftModel.from_pretrained(load(), adapter).merge_and_unload()
    losses["merged into bfloat16"] = loss_of(merged, held_out, collator)
    merged.save_pretrained(merged_folder)
    tokenizer.save_pretrained(merged_folder)

    curves = {"NF4": curve, "bfloat16": plain_curve}
    draw(curves, options.out / "loss.png")
    (options.out / "result.json").write_text(json.dumps({"losses": losses, "curves": curves}, indent=1))
    for name, value in losses.items():
        print(f"{name:22} {value:.3f} nats per token")
    prompt = tokenizer("Dear owl, today I", return_tensors="pt").to(merged.device)
    tokens = merged.generate(**prompt, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

"""How long a model takes to load, how much memory that needs, and how fast it decodes: `make bench`.

Every measurement has a fresh process, and the ways of loading take turns, so that a slow minute of the
machine hits all of them. Compared are medians over the rounds, and ratios within each round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewbits.machine import cpu_name

DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"
PROMPT_TOKENS = 8
BASELINE = "torch bf16"
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
INT8 = {"load_in_8bit": True}
# label: (who loads it, arguments of transformers' BitsAndBytesConfig or None)
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    BASELINE: ("torch", None),
    "fewbits NF4, double quant": ("fewbits", NF4),
    "fewbits LLM.int8()": ("fewbits", INT8),
    "bitsandbytes NF4, double quant": ("bitsandbytes", NF4),
    "bitsandbytes LLM.int8()": ("bitsandbytes", INT8),
}
# name in the results: (heading, unit shown, factor to that unit, digits)
COLUMNS = {
    "load_seconds": ("load", "s", 1.0, 2),
    "peak_bytes": ("peak", "MB", 1e-6, 0),
    "tokens_per_second": ("decode", "tok/s", 1.0, 2),
}


def main() -> None:
    options = arguments()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](json.loads(options.job))))
        return
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as scratch:
        results = run(options, Path(scratch))
    print(json.dumps(results, indent=2) if options.json else as_text(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=100, help="millions in the generated model (100)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (3)")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens per measurement (8)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves the choice to it (0)")
    parser.add_argument("--no-demo", action="store_true", help="leave out the model in demo/")
    parser.add_argument("--only", default="", help="only labels with this in them, and the baseline")
    parser.add_argument("--json", action="store_true", help="print all single figures as JSON")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the process that waits and counts --------------------------------------------------------------


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All figures: models → variants → one entry per round."""
    started = time.perf_counter()
    generated, tiny = scratch / "generated", scratch / "tiny"
    for folder, millions in ((generated, options.parameters), (tiny, 0.5)):
        child("generate", {"folder": str(folder), "millions": millions})
    models = {"generated": generated} if options.no_demo else {"generated": generated, "demo": DEMO}
    here = {name: variant for name, variant in VARIANTS.items() if available(variant[0])}
    here = {name: variant for name, variant in here.items() if name == BASELINE or options.only in name}
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {m: {v: [] for v in here} for m in models}
    for number in range(options.rounds):
        for model, folder in models.items():
            for label, (library, settings) in here.items():
                print(f"round {number + 1} of {options.rounds}: {model}, {label}", file=sys.stderr)
                job = {
                    "model": str(folder),
                    "warm_up": str(tiny),
                    "library": library,
                    "settings": settings,
                    "tokens": options.tokens,
                    "threads": options.threads,
                }
                figures[model][label].append(child("measure", job))
    first = figures["generated"][BASELINE][0]
    return {
        "cpu": cpu_name(),
        "threads": first["threads"],
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | ({"bitsandbytes": version("bitsandbytes")} if available("bitsandbytes") else {}),
        "parameters": {model: rows[BASELINE][0]["parameters"] for model, rows in figures.items()},
        "tokens": options.tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "wall_seconds": time.perf_counter() - started,
        "figures": figures,
    }


def available(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def child(worker: str, job: dict[str, Any]) -> Any:
    """What a worker in a process of its own answers; its messages show only when it fails."""
    command = [sys.executable, __file__, "--worker", worker, "--job", json.dumps(job)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: {worker} ended with code {done.returncode}: {job}")
    return json.loads(done.stdout.splitlines()[-1])


def as_text(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [f"{results['cpu']}, {results['threads']} threads; {versions}"]
    for model, rows in results["figures"].items():
        lines += ["", f"{model} model, {results['parameters'][model]:,} parameters in bfloat16", heading()]
        lines += [row(label, entries, rows[BASELINE]) for label, entries in rows.items()]
    rounds = len(next(iter(results["figures"].values()))[BASELINE])
    tokens, prompt = results["tokens"], results["prompt_tokens"]
    lines += [
        "",
        f"Medians of {rounds} rounds; ×: median of the ratios to {BASELINE} within each round.",
        "load: until the first token is there. peak: largest resident set, mapped files included, above that",
        "of the same process after it loaded and ran a tiny model in the same way. decode: greedy, one",
        f"sequence, {tokens} tokens after a prompt of {prompt}, prompt included.",
        f"The whole run took {results['wall_seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def heading() -> str:
    return f"{'':32}" + "".join(f"{f'{name} {unit}':>16} {'×':>6}" for name, unit, _, _ in COLUMNS.values())


def row(label: str, entries: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    cells = []
    for key, (_, _, factor, digits) in COLUMNS.items():
        value = statistics.median(entry[key] for entry in entries)
        ratios = [entry[key] / base[key] for entry, base in zip(entries, baseline, strict=True) if base[key]]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        cells.append(f"{value * factor:16.{digits}f} {ratio:>6}")
    return f"{label:32}" + "".join(cells)


def generate(job: dict[str, Any]) -> None:
    """Write a random Llama of about `millions` million parameters in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, vocabulary, head = 8, 4096, 64
    # A layer has about 12 hidden² weights: 4 hidden² of attention, 3 · hidden · 8/3 hidden of the MLP.
    hidden = max(1, round((job["millions"] * 1e6 / (12 * layers)) ** 0.5 / head)) * head
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / head) * head,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(job["folder"])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load one model in one way and decode with it."""
    import torch

    from fewbits.machine import PeakMemory

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    prompt = torch.arange(1, PROMPT_TOKENS + 1).unsqueeze(0)
    decode(load(job, job["warm_up"]), prompt, 2)

    peak = PeakMemory()
    start = time.perf_counter()
    model = load(job, job["model"])
    decode(model, prompt, 1)  # plain weights are only mapped until they are used for the first time
    ready = time.perf_counter()
    decode(model, prompt, job["tokens"])
    return {
        "load_seconds": ready - start,
        "tokens_per_second": job["tokens"] / (time.perf_counter() - ready),
        "peak_bytes": peak.bytes_above_start(),
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
    }


def load(job: dict[str, Any], folder: str) -> Any:
    """The model in `folder`, on the CPU, by the library that the job names."""
    import transformers

    import fewbits

    fewbits.enable(takeover=job["library"] == "fewbits")
    settings = job["settings"]
    config = None if settings is None else transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype="bfloat16", device_map="cpu"
    ).eval()
    layer = type(model.model.layers[0].mlp.up_proj).__module__
    if not layer.startswith(job["library"]):
        raise RuntimeError(f"{job['library']} was to load {folder}, but its layers are from {layer}")
    return model


def decode(model: Any, prompt: Any, tokens: int) -> None:
    """Greedily, exactly that many new tokens."""
    import torch

    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )


WORKERS = {"generate": generate, "measure": measure}

if __name__ == "__main__":
    main()

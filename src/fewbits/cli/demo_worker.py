"""Measure one variant of the demo in this process: `python -m fewbits.cli.demo_worker JOB`.

JOB is a `demo.Job` as JSON. The answer goes to stdout as JSON lines, see `demo._run_worker`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.cli.demo import PROMPT, VARIANTS, Job, Variant
from fewbits.evaluate import compare_logits, decode_rate, sample_sequences
from fewbits.machine import PeakMemory

DECODED_TOKENS = 32
DECODE_REPEATS = 3
TEXT_TOKENS = 48


def main() -> None:
    """Entry point; ends the process with 0 if an answer was given, also if that is an error."""
    answers = _private_stdout()
    job = Job(**json.loads(sys.argv[1]))
    try:
        figures = _measure(job, lambda stage: _say(answers, stage=stage))
    except (ValueError, OSError) as error:
        _say(answers, error=str(error))
    else:
        _say(answers, figures=figures)


def _private_stdout() -> TextIO:
    """The real stdout; whatever else prints in this process goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, **message: Any) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _measure(job: Job, stage: Callable[[str], None]) -> dict[str, Any]:
    variant = next(variant for variant in VARIANTS if variant.key == job.variant)
    fewbits.enable(takeover=True)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    _warm_up(variant, job, prompt)

    stage("loading")
    peak = PeakMemory()
    model = _load(variant, job)
    stage("generating")
    text = _continue(model, tokenizer, prompt)
    rate = decode_rate(model, prompt, DECODED_TOKENS, repeats=DECODE_REPEATS)
    peak_bytes = peak.bytes_above_start()

    stage("comparing")
    reference = _load(VARIANTS[0], job)
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    quality = compare_logits(reference, model, _sequences(reference, job))
    if any(other.reload_of == variant.key for other in VARIANTS):
        model.save_pretrained(Path(job.scratch, variant.key))
    size = model.get_memory_footprint()
    return {
        "weight_bytes": size,
        "bits_per_weight": 8 * size / parameters,
        "parameters": parameters,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "quality": asdict(quality),
        "tokens_per_second": rate,
        "decoded_tokens": DECODED_TOKENS,
        "decode_repeats": DECODE_REPEATS,
        "peak_bytes": peak_bytes,
        "peak_is_exact": peak.exact,
        "threads": torch.get_num_threads(),
        "text": text,
    }


def _warm_up(variant: Variant, job: Job, prompt: torch.Tensor) -> None:
    """Load and run once, then forget: libraries and their buffers are no part of a model's memory, and
    far larger than a small model."""
    decode_rate(_load(variant, job), prompt, 4, repeats=1)


def _load(variant: Variant, job: Job) -> Any:
    """On the CPU for every variant: resident memory is what the demo compares."""
    auto = transformers.AutoModelForCausalLM
    if variant.reload_of is not None:
        model = auto.from_pretrained(Path(job.scratch, variant.reload_of), device_map="cpu")
    elif variant.settings is not None:
        config = transformers.BitsAndBytesConfig(**variant.settings)
        model = auto.from_pretrained(job.model, quantization_config=config, device_map="cpu")
    else:
        model = auto.from_pretrained(job.model, device_map="cpu")
    return model.eval()


def _sequences(reference: Any, job: Job) -> torch.Tensor:
    """The first worker samples; the others read what it sampled, so that all see the same tokens."""
    path = Path(job.scratch, "samples.safetensors")
    if not path.exists():
        drawn = sample_sequences(reference, count=job.samples, length=job.tokens, seed=job.seed)
        save_file({"tokens": drawn}, path)
    return load_file(path)["tokens"]


def _continue(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    """The prompt and its greedy continuation, cut behind the last whole sentence if there is one."""
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=TEXT_TOKENS,
    )
    text = " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
    ends = [match.end() for match in re.finditer(r"[.!?][\"'”’]*(?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


if __name__ == "__main__":
    main()

"""Measure one model in this process: `python -m fewbits.cli.measure_worker JOB`.

JOB is a `measure.Job` as JSON. The answer goes to stdout as JSON lines, see `measure.run_worker`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.cli.measure import SEQUENCES, Job
from fewbits.cli.measured import Figures, Subject
from fewbits.evaluate import compare_logits, decode_rate, sample_sequences, weight_errors
from fewbits.machine import PeakMemory

DECODED_TOKENS = 32
DECODE_REPEATS = 3
TEXT_TOKENS = 48

Stage = Callable[[str, float], None]


def main() -> None:
    """Entry point; ends the process with 0 if an answer was given, also if that is an error."""
    answers = _private_stdout()
    job = Job.from_json(sys.argv[1])
    try:
        figures = _measure(job, lambda stage, share: _say(answers, stage=stage, share=share))
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        _say(answers, error=str(error))
    else:
        _say(answers, figures=asdict(figures))


def _private_stdout() -> TextIO:
    """The real stdout; whatever else prints in this process goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, **message: Any) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _measure(job: Job, stage: Stage) -> Figures:
    subject, plan = job.subject, job.plan
    torch.set_num_threads(plan.threads)
    fewbits.enable(takeover=True)
    transformers.utils.logging.disable_progress_bar()
    tokenizer, prompt = _prompt(job)
    # Load and run once, then forget: libraries and their buffers are no part of a model's memory, and far
    # larger than a small model.
    decode_rate(_load(subject), prompt, 4, repeats=1)

    stage("loading", 0.0)
    peak = PeakMemory()
    model = _load(subject)
    stage("generating", 0.0)
    text = None if tokenizer is None else _continue(model, tokenizer, prompt)
    rate = decode_rate(model, prompt, DECODED_TOKENS, repeats=DECODE_REPEATS)
    peak_bytes = peak.bytes_above_start()

    stage("comparing", 0.0)
    reference = model if subject == job.reference else _load(job.reference)
    sequences = _sequences(reference, job)
    quality = compare_logits(
        reference, model, sequences, batch=plan.batch, progress=lambda share: stage("comparing", share)
    )
    errors, note = _weight_errors(reference, model)
    if subject.save_to is not None:
        model.save_pretrained(subject.save_to)
    report = fewbits.report(model)
    size, parameters = model.get_memory_footprint(), sum(entry.count for entry in report.entries)
    return Figures(
        weight_bytes=size,
        kept_bytes=sum(entry.nbytes for entry in report.kept),
        bits_per_weight=8 * size / parameters,
        parameters=parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        stored=dict(Counter(entry.stored for entry in report.entries)),
        quality=quality,
        weight_errors=errors,
        weight_note=note,
        tokens_per_second=rate,
        decoded_tokens=DECODED_TOKENS,
        decode_repeats=DECODE_REPEATS,
        peak_bytes=peak_bytes,
        peak_is_exact=peak.exact,
        text=text,
    )


def _prompt(job: Job) -> tuple[Any, torch.Tensor]:
    """(tokenizer, prompt int64 [1, tokens]); without a prompt (None, the begin token)."""
    if job.plan.prompt is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.reference.folder, trust_remote_code=False)
        return tokenizer, tokenizer(job.plan.prompt, return_tensors="pt").input_ids
    config = transformers.AutoConfig.from_pretrained(job.reference.folder, trust_remote_code=False)
    return None, torch.tensor([[getattr(config.get_text_config(), "bos_token_id", None) or 0]])


def _load(subject: Subject) -> Any:
    """On the CPU for every model: resident memory is what is compared.

    ValueError if weights are missing or of another shape, which transformers would draw at random.
    """
    options: dict[str, Any] = {}
    if subject.settings is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**subject.settings)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        subject.folder,
        device_map="cpu",
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    odd = sorted([*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])])
    if odd:
        raise ValueError(
            f"{len(odd)} weights are missing in the checkpoint or have another shape than config.json says, "
            f"such as {odd[0]}; get the model again or save it again"
        )
    return model.eval()


def _sequences(reference: Any, job: Job) -> torch.Tensor:
    """Those of the text, or samples: the first worker draws them, the others read what it drew."""
    path = Path(job.scratch, SEQUENCES)
    if not path.exists():
        drawn = sample_sequences(reference, count=job.plan.count, length=job.plan.tokens, seed=job.plan.seed)
        save_file({"tokens": drawn}, path)
    return load_file(path)["tokens"]


def _weight_errors(reference: Any, model: Any) -> tuple[dict[str, float] | None, str]:
    """(errors by weight, ""), or (None, why there are none)."""
    if model is reference:
        return {}, ""
    try:
        return weight_errors(reference, model), ""
    except ValueError as error:
        return None, str(error)


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

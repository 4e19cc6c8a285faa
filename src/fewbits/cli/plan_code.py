"""A row of `fewbits plan` as paste-ready Python, and as the next command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fewbits.cli.plan_methods import EMBEDDING_FORMAT, Case, Row, Source


def command(path: str, row: Row, source: Source) -> str:
    """The next command: to quantize, or to try or look at what needs no quantizing."""
    method = row.method
    if method.format is None:
        words = ["generate", path, "Once upon a time"] if source.is_causal else ["inspect", path]
        return shlex.join(["fewbits", *words])
    words = ["fewbits", "quantize", path, f"{Path(path).name}-{method.key}"]
    words += ["--int8"] if method.key == "int8" else ["--format", method.format]
    words += [word for name in row.embeddings for word in ("--set", f"{name}={EMBEDDING_FORMAT}")]
    return shlex.join(words)


def code(path: str, row: Row, source: Source, case: Case) -> str:
    """Python that loads the model at `path` so, and gets it ready to train if that is the case."""
    method = row.method
    auto = "AutoModelForCausalLM" if source.is_causal else source.architecture
    config = _config(row, source)
    arguments = [json.dumps(path)]
    arguments += ["quantization_config=config"] if config else []
    arguments += [f"dtype=torch.{method.dtype}"] if method.dtype else []
    arguments += ['device_map="auto"']
    body = [*config, *_call("model", f"{auto}.from_pretrained", arguments)]
    body += [f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(path)})"]
    if case.rank is not None:
        body += _training(case.rank)
    names = [auto, "AutoTokenizer", *(["BitsAndBytesConfig"] if method.options else [])]
    return "\n".join([*_imports(body, names, source), "", *body])


def _imports(body: Sequence[str], names: Sequence[str], source: Source) -> list[str]:
    """The imports that `body` needs; fewbits also for what it only has to be imported for."""
    text = "\n".join(body)
    lines = ["import fewbits"] if "fewbits." in text or source.is_quantized else []
    lines += ["import torch"] if "torch." in text else []
    lines += ["from peft import LoraConfig, get_peft_model"] if "get_peft_model" in text else []
    return [*lines, f"from transformers import {', '.join(sorted(names))}"]


def _config(row: Row, source: Source) -> list[str]:
    """Lines that make `config`; none where no weight is quantized while loading."""
    method = row.method
    takeover = "fewbits.enable(takeover=True)  # serve this class also where bitsandbytes is installed"
    if method.options:
        options, note = [*method.options], []
        if method.options[0].startswith("load_in_4bit"):
            options.append(f"bnb_4bit_compute_dtype=torch.{source.dtype}")
            note = ["# Without a compute dtype, which is that of the model here, it would be float32: slow."]
        return [takeover, *note, *_call("config", "BitsAndBytesConfig", options)]
    if method.format is not None:
        modules = ", ".join(f'"{name}": "{EMBEDDING_FORMAT}"' for name in row.embeddings)
        return _call("config", "fewbits.FewbitsConfig", [f'"{method.format}"', f"modules={{{modules}}}"])
    return [takeover] if source.is_quantized else []


def _training(rank: int) -> list[str]:
    return [
        'model.gradient_checkpointing_enable({"use_reentrant": False})',
        *_call(
            "adapters",
            "LoraConfig",
            [f"r={rank}", f"lora_alpha={2 * rank}", 'target_modules="all-linear"', 'task_type="CAUSAL_LM"'],
        ),
        "model = get_peft_model(model, adapters)",
    ]


def _call(name: str, function: str, arguments: Sequence[str]) -> list[str]:
    """`name = function(arguments)`, on several lines if it is long."""
    line = f"{name} = {function}({', '.join(arguments)})"
    if len(line) <= 88:
        return [line]
    return [f"{name} = {function}(", *(f"    {argument}," for argument in arguments), ")"]

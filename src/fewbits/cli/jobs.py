"""What `fewbits quantize` is asked → a job: the source, what becomes of it, and where it goes."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbits.checkpoint.card import inherited
from fewbits.checkpoint.files import file_hash
from fewbits.checkpoint.finish import carried, check_out, model_name
from fewbits.checkpoint.folder import Folder, checked_file, open_folder
from fewbits.checkpoint.job import Job, Shard, split
from fewbits.checkpoint.safetensors import shown
from fewbits.cli.common import find_model
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.format import Scheme
from fewbits.machine import versions
from fewbits.recipe import Rule
from fewbits.report import Entry, Report

if TYPE_CHECKING:
    from fewbits.integrations.streaming import Plan

Config = BitsAndBytesConfig | FewbitsConfig

DEFAULT_FORMAT = "nf4:g64:dq"
_BITSANDBYTES_FORMATS = ("nf4:g64", "nf4:g64:dq", "fp4:g64", "fp4:g64:dq")


@dataclass(frozen=True)
class Request:
    """The arguments that decide the bytes of the result. sets: "PATTERN=FORMAT" in order."""

    source: str
    out: Path
    format: str | None
    int8: bool
    config: Path | None
    sets: tuple[str, ...]
    max_shard_bytes: int
    base_model: str | None

    def command(self, source: str) -> str:
        """The command that makes the result from the model called `source`: one spelling, however it was
        given, and no path of this machine."""
        words = ["fewbits", "quantize"]
        if self.config is not None:
            words += ["--config", self.config.name]
        else:
            words += ["--int8"] if self.int8 else ["--format", self.spelling]
        words += [word for one in self.sets for word in ("--set", one)]
        words += ["--max-shard-size", str(self.max_shard_bytes)]
        words += [f"--base-model={self.base_model}"] if self.base_model is not None else []
        names = [source, self.out.name]
        words += ["--"] * any(name.startswith("-") for name in names)
        return shlex.join(shown(word) for word in (*words, *names))

    @property
    def spelling(self) -> str:
        """The Scheme of all linear layers, in its one spelling."""
        return str(Scheme.parse(DEFAULT_FORMAT if self.format is None else self.format))


@dataclass(frozen=True)
class Planned:
    """A job, the report of its result, and what stays behind. largest: elements of the largest tensor."""

    job: Job
    report: Report
    original_bytes: int
    largest: int
    left: tuple[str, ...]


def plan_job(request: Request) -> Planned:
    """All checks that need no weights, and the job that they allow.

    CheckpointError for a source that cannot be trusted or used; ValueError, FileExistsError and the like for
    arguments that make no sense.
    """
    from fewbits.integrations import streaming  # loads transformers, which takes seconds

    if request.max_shard_bytes < 1:
        raise ValueError("--max-shard-size must be at least one byte")
    config = chosen_config(request)
    path = find_model(request.source).resolve()
    check_out(request.out, path)
    folder = open_folder(path)
    plan = streaming.plan(folder, config)
    _check_patterns(request.sets, plan)
    if not plan.report.quantized:
        largest = max(plan.report.kept, key=lambda entry: entry.nbytes)
        raise ValueError(f"nothing would be quantized; the largest weight, {largest.name}: {largest.reason}")
    shards = split(plan.units, request.max_shard_bytes)
    copies, left = carried(path)
    identity = _identity(request, folder, plan, shards, copies)
    texts = {"config.json": json.dumps(plan.config, indent=2, sort_keys=True) + "\n"}
    job = Job(folder, request.out, shards, identity, texts, copies)
    return Planned(job, plan.report, folder.nbytes, plan.largest, tuple(left))


def chosen_config(request: Request) -> Config | Callable[[torch.dtype], Config]:
    """The config that the arguments mean; with --format and --int8, given the dtype of the model."""
    if sum((request.format is not None, request.int8, request.config is not None)) > 1:
        raise ValueError("--format, --int8 and --config exclude each other; give one of them")
    if request.config is not None:
        if request.sets:
            raise ValueError("--set adds to --format or --int8; with --config, name the modules in that file")
        return read_config(request.config)
    sets = dict(_pair(one) for one in request.sets)
    if len(sets) < len(request.sets):
        raise ValueError("--set names a pattern twice; give each pattern once")
    skips = [pattern for pattern, entry in sets.items() if entry == "skip"]
    format = "int8:row@int8:t6" if request.int8 else request.spelling
    if len(skips) < len(sets) or not (request.int8 or format in _BITSANDBYTES_FORMATS):
        return FewbitsConfig(format, modules=sets)
    skip_list = skips or None
    if request.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_list)
    family, double = format.split(":")[0], format.endswith(":dq")

    def in_dtype(dtype: torch.dtype) -> Config:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip_list,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=family,
            bnb_4bit_use_double_quant=double,
        )

    return in_dtype


def read_config(path: Path) -> Config:
    """The quantization config in a JSON file: alone, or as "quantization_config" of a config.json."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is not JSON: {error}") from error
    options = found.get("quantization_config", found) if isinstance(found, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} holds no JSON object")
    return config_of(options, f"--config {path}")


def config_of(options: dict[str, Any], where: str) -> Config:
    """The config in the JSON object `options`, which stands in `where`."""
    kinds: dict[str, type[Config]] = {"bitsandbytes": BitsAndBytesConfig, "fewbits": FewbitsConfig}
    guess = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(options) else "fewbits"
    method = options.get("quant_method", guess)
    if not isinstance(method, str) or method not in kinds:
        raise ValueError(f'{where} has quant_method {method!r}; fewbits makes "bitsandbytes" and "fewbits"')
    try:
        config: Config = kinds[method].from_dict(options)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    return config


def _check_patterns(sets: Sequence[str], plan: Plan) -> None:
    """ValueError for a --set that names no module: a typing error would give another model than was meant."""
    for one in sets:
        pattern, _ = _pair(one)
        rule = Rule(pattern, None, "")
        if not any(rule.matches(name) for name in plan.modules):
            names = {name.rpartition(".")[2] for name in plan.modules} | set(plan.modules)
            near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "`fewbits inspect` shows the names"
            raise ValueError(
                f"--set {one!r} names nothing to quantize in {plan.config['architectures'][0]}; {hint}"
            )


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, entry = text.rpartition("=")
    if not equals or not pattern or not entry:
        raise ValueError(f"--set {text!r} is not PATTERN=FORMAT, such as 'lm_head=int8' or 'q_proj=skip'")
    return pattern, entry


def _identity(
    request: Request,
    folder: Folder,
    plan: Plan,
    shards: Sequence[Shard],
    copies: Mapping[str, Path],
) -> dict[str, Any]:
    card = folder.path / "README.md"
    facts = inherited(checked_file(folder.path, card.name)) if card.is_file() else {}
    name = model_name(folder.path) if Path(request.source).is_dir() else request.source  # a model id
    return {
        "name": request.out.name,
        "base_model": request.base_model or name,
        "architecture": plan.config["architectures"][0],
        "method": plan.config["quantization_config"]["quant_method"],
        "quantization_config": plan.config["quantization_config"],
        "command": request.command(name),
        "versions": versions("torch", "transformers"),
        "source": {file: [header.size, header.digest] for file, header in folder.headers.items()},
        "config_sha256": file_hash(folder.path / "config.json"),
        "carried": {file: file_hash(path) for file, path in copies.items()},
        "parameters": sum(entry.count for entry in plan.report.entries),
        "source_bytes": folder.nbytes,
        "weights": [_weight(entry) for entry in plan.report.entries],
        "shards": [[shard.name, shard.size] for shard in shards],
        "card": facts,
    }


def _weight(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "count": entry.count,
        "stored": entry.stored,
        "quantized": entry.quantized,
        "reason": entry.reason,
        "nbytes": entry.nbytes,
    }


def part_name(worker: str | None) -> str:
    """What the lock of a worker's part is called."""
    return "all" if worker is None else f"worker-{worker.replace('/', '-of-')}"


def part_of(shards: Sequence[Shard], worker: str | None) -> tuple[Shard, ...]:
    """The shards of worker "i/N": every N-th from the i-th on; all of them without a worker."""
    if worker is None:
        return tuple(shards)
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", worker)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--worker {worker!r} is not i/N with i from 1 to N, such as 2/4")
    return tuple(shards[int(found[1]) - 1 :: int(found[2])])

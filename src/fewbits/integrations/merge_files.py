"""A base and a LoRA adapter → a folder with the merged model: the job behind `fewbits merge`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import work
from fewbits.checkpoint.adapter import Adapter, open_adapter
from fewbits.checkpoint.card import inherited
from fewbits.checkpoint.files import file_hash
from fewbits.checkpoint.finish import carried, check_out, check_place, finish, model_name
from fewbits.checkpoint.folder import Folder, checked_file, open_folder
from fewbits.checkpoint.job import Job, Shard, partial_folder, split
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError, shown
from fewbits.checkpoint.session import check_start, discard, session
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.integrations.decoded import DecodedFolder, decoded_folder
from fewbits.integrations.merging import MERGED, MergePlan, plan
from fewbits.machine import usable_cores, versions

Config = BitsAndBytesConfig | FewbitsConfig
Quantization = Config | Callable[[torch.dtype], Config]

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Base:
    """Weights that an adapter can be merged into.

    folder: them, or what they are made from; quantization: how they are quantized and decoded first, None for
    as they are; options: of the command that chooses them; name: of the model whose weights they are.
    """

    folder: Folder
    quantization: Quantization | None
    options: tuple[str, ...]
    name: str

    def called(self, name: str) -> str:
        """What the result's card calls these weights of the model `name`."""
        if self.quantization is not None:
            return f"the weights of {name}, quantized to {spelling(self.quantization)} and decoded"
        if isinstance(self.folder, DecodedFolder):
            return f"the weights of {model_name(self.folder.path)}, decoded"
        return f"the original weights of {name}"


@dataclass(frozen=True)
class PlannedMerge:
    """A job, the plan behind it, and what stays behind."""

    job: Job
    plan: MergePlan
    left: tuple[str, ...]


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quantization: Config | None = None,
    again: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int | None = None,
) -> MergePlan:
    """Merge the LoRA adapter in the folder `adapter` into the checkpoint `base`, file to file, as `out`.

    What `fewbits merge` does once a base is chosen. quantization: merge into the weights that this config
    decodes to, and not into those of `base`; a `base` that is quantized is decoded as it is stored. again:
    allow a base into which another adapter was merged before. `out` appears when all of it is written.

    Peak memory depends on the largest tensor only. CheckpointError for files that are not sound or do not
    fit each other, ValueError for values that are not finite, OSError for an `out` that is in the way.
    """
    folder, found, target = open_base(Path(base)), open_adapter(Path(adapter)), Path(out)
    check_place(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; overwrite=True replaces it")
    planned = plan_merge(
        chosen_base(folder, quantization), found, target, again=again, max_shard_bytes=max_shard_bytes
    )
    job, cores = planned.job, threads or usable_cores()
    if overwrite:
        discard(partial_folder(target))
    check_start(job, join=False)
    check_sources(job, found)
    with session(job, "all", join=False):
        limit = work.memory_limit(job, planned.plan.largest, cores)
        work.run(job, job.shards, threads=cores, memory=limit, advance=lambda _: None)
        finish(target, overwrite=overwrite)
    return planned.plan


def open_base(path: Path) -> Folder:
    """The checkpoint in the folder `path`; a quantized one as what its weights decode to."""
    folder = open_folder(path.resolve())
    return folder if folder.quantization is None else decoded_folder(folder)


def chosen_base(
    folder: Folder, quantization: Quantization | None, options: Sequence[str] = (), name: str = ""
) -> Base:
    """`folder`'s weights as they are; or with a `quantization`, which `options` spell, decoded from that.
    name: of the model, that of the folder by default."""
    name = name or model_name(folder.path)
    if isinstance(folder, DecodedFolder):
        if quantization is not None:
            raise ValueError(f"{folder.path} is quantized already; it is decoded as it is stored")
        return Base(folder, None, ("--base", "dequantized", *options), name)
    if quantization is None:
        return Base(folder, None, ("--base", "original"), name)
    return Base(folder, quantization, ("--base", "dequantized", *options), name)


def spelling(quantization: Quantization) -> str:
    """The format that a config gives to most layers."""
    config = quantization(torch.bfloat16) if callable(quantization) else quantization
    return str(config.to_recipe().rules[-1].scheme)


def check_sources(job: Job, adapter: Adapter) -> None:
    """CheckpointError for NaN or infinity in what is to be merged."""
    for folder, names in ((adapter.folder, adapter.folder.files), (job.source, job.source.files)):
        for name in names:
            folder.check(name, lambda _: None)


def plan_merge(
    base: Base,
    adapter: Adapter,
    out: Path,
    *,
    again: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    base_model: str | None = None,
) -> PlannedMerge:
    """All checks that need no weights, and the job that they allow. base_model: what the card calls the
    base."""
    if max_shard_bytes < 1:
        raise ValueError("weight files must have at least one byte")
    folder = base.folder
    for path in (folder.path, adapter.path.resolve()):
        check_out(out, path)
    before = check_not_merged(folder, adapter, again=again)
    found = plan(folder, adapter, base.quantization)
    shards = split(found.units, max_shard_bytes)
    copies, left = carried(folder.path)
    name = base_model or base.name
    record = {
        "adapter": adapter.path.resolve().name,
        "sha256": adapter.digest,
        "into": base.called(name),
        "fewbits": versions()["fewbits"],
    }
    config = found.config | {MERGED: [*before, record]}
    identity = {
        "name": out.name,
        "base_model": name,
        "architecture": found.config["architectures"][0],
        "method": "merge",
        "adapter": {
            "name": shown(adapter.path.resolve().name),
            "into": base.called(name),
            "sha256": adapter.digest,
        },
        "quantization": None if base.quantization is None else _settings(base, found),
        "command": _command(base, adapter, out, max_shard_bytes, base_model),
        "versions": versions("torch", "transformers"),
        "source": {file: [header.size, header.digest] for file, header in folder.headers.items()},
        "config_sha256": file_hash(folder.path / "config.json"),
        "carried": {file: file_hash(path) for file, path in copies.items()},
        "parameters": sum(entry["count"] for entry in _weights(shards, found.changes)),
        "source_bytes": folder.nbytes,
        "weights": _weights(shards, found.changes),
        "shards": [[shard.name, shard.size] for shard in shards],
        "card": _facts(folder),
    }
    texts = {"config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}
    return PlannedMerge(Job(folder, out, shards, identity, texts, copies), found, tuple(left))


def check_not_merged(folder: Folder, adapter: Adapter, *, again: bool) -> list[dict[str, Any]]:
    """What was merged into `folder` before. CheckpointError if that is `adapter`, or anything and not
    `again`."""
    found = folder.config.get(MERGED, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise CheckpointError(f"config.json of {folder.path}: {MERGED} is no list of records; remove it")
    names = ", ".join(shown(str(one.get("adapter"))) for one in found)
    if any(one.get("sha256") == adapter.digest for one in found):
        raise CheckpointError(
            f"{folder.path} is the result of merging this very adapter ({names}) already; merging it twice "
            "would double it. Give the base that it was trained on"
        )
    if found and not again:
        raise CheckpointError(
            f"{folder.path} is a merged model already ({names}), and no adapter is trained on that by "
            "accident; give the original base, or --again to merge one adapter after the other"
        )
    return found


def _settings(base: Base, found: MergePlan) -> dict[str, Any]:
    """The quantization config as JSON values."""
    quantization = base.quantization
    assert quantization is not None
    config = quantization(found.model.dtype) if callable(quantization) else quantization
    settings: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return settings


def _command(base: Base, adapter: Adapter, out: Path, max_shard_bytes: int, base_model: str | None) -> str:
    """The command that makes the result: no path of this machine in it."""
    words = ["fewbits", "merge", *base.options, "--max-shard-size", str(max_shard_bytes)]
    words += [f"--base-model={base_model}"] if base_model is not None else []
    names = [base.name, adapter.path.resolve().name, out.name]
    words += ["--"] * any(name.startswith("-") for name in names)
    return shlex.join(shown(word) for word in (*words, *names))


def _weights(shards: Sequence[Shard], changes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every tensor of the result; `reason` says what the adapter changed."""
    return [
        {
            "name": name,
            "shape": list(info.shape),
            "count": info.count,
            "stored": str(TORCH_DTYPES[info.dtype]).removeprefix("torch."),
            "quantized": False,
            "reason": changes.get(name, ""),
            "nbytes": info.nbytes,
        }
        for shard in shards
        for name, info in shard.places.items()
    ]


def _facts(folder: Folder) -> dict[str, Any]:
    card = folder.path / "README.md"
    return inherited(checked_file(folder.path, card.name)) if card.is_file() else {}

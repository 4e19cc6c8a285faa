"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

    W' = W + s B A                          s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)
    W' = m (W + s B A) / ‖W + s B A‖        DoRA (arXiv 2402.09353): norms of the rows of W as [out, in]

`open_adapter` reads names, shapes and settings; `merged` does the arithmetic, in float32, and rounds once.
Whatever an adapter says that is not known here is refused: a merge that leaves something out gives another
model than the one that was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.files import file_hash
from fewbits.checkpoint.folder import Folder, check_is_folder, checked_file, read_json, read_text, some
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError, read_header, shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_BLOCK = 2**22  # weights in float32 at a time, 16 MiB
_MAX_BYTES = 10_000_000  # of the config, and of a card
_MAX_PATTERNS, _MAX_PATTERN = 10_000, 300  # number of patterns; characters of one
_MAX_NAME = 500  # characters, as patterns take time that grows with a power of them
_PREFIX = "base_model.model."
_AGAIN = "save the adapter again with PEFT's save_pretrained"

# Settings that say nothing about the arithmetic, or that the tensors say as well.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_parameters",
    "use_dora",
    "use_rslora",
}
# Ways to begin that leave the base as it was.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")

# What decides the codes of a weight, among what PEFT notes in a card.
_QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")

_SUFFIXES = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"(.+)\.lora_A\.weight", "a"),
        (r"(.+)\.lora_B\.weight", "b"),
        (r"(.+)\.lora_B\.bias", "bias"),
        (r"(.+)\.lora_embedding_A", "embedding_a"),
        (r"(.+)\.lora_embedding_B", "embedding_b"),
        (r"(.+)\.lora_magnitude_vector(?:\.weight)?", "magnitude"),
    )
)
_NAMES = {
    "a": "lora_A",
    "b": "lora_B",
    "embedding_a": "lora_embedding_A",
    "embedding_b": "lora_embedding_B",
}
_FOREIGN = re.compile(r"(^|\.)(lora|adalora|vera|hada|lokr|ia3|oft|boft|trainable_tokens|prompt)_")


@dataclass(frozen=True)
class Branch:
    """The low-rank branch of one module: names of tensors in the adapter's file.

    module: as the model calls it; depth: how many other branches of the same module wrap this one, which
    belongs to one of its parameters then; a: [rank, in]; b: [out, rank]; embedding: of an embedding, whose
    weight is [in, out]; magnitude: [out] of DoRA; bias: [out] that is added to the bias. "" where there is
    none.
    """

    module: str
    depth: int
    a: str
    b: str
    embedding: bool = False
    magnitude: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor W of the model.

    saved: tensor of the adapter that takes its place first; branch: what is added, of rank `rank` (per
    expert), times `scale`; turned: W is [..., in, out] and not [..., out, in]; bias: tensor that is added,
    times `scale`. "" for none.
    """

    saved: str = ""
    branch: Branch | None = None
    bias: str = ""
    rank: int = 0
    scale: float = 1.0
    turned: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the adapter's tensors that it uses."""
        branch = self.branch
        low_rank = (branch.a, branch.b, branch.magnitude) if branch else ()
        return tuple(name for name in (self.saved, *low_rank, self.bias) if name)

    @property
    def words(self) -> str:
        """What it is, in a word or two."""
        kinds = (
            ("replaced", self.saved),
            ("DoRA", self.branch is not None and self.branch.magnitude),
            ("LoRA", self.branch is not None and not self.branch.magnitude),
            ("bias added", self.bias),
        )
        return ", ".join(word for word, holds in kinds if holds)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter. folder: its tensors; saved: tensor of the model → tensor that replaces it; digest:
    SHA-256 of the weight file, as hex; trained_on: what the adapter's config calls its base."""

    folder: Folder
    config: Mapping[str, Any]
    branches: tuple[Branch, ...]
    saved: Mapping[str, str]
    digest: str
    trained_on: str = ""
    quantization: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        return self.folder.path

    def rank(self, name: str) -> int:
        """The rank of the branch of the module, or parameter, called `name`."""
        return int(_pattern_value(self.config["rank_pattern"], name, self.config["r"]))

    def scale(self, name: str) -> float:
        """What its product B A is multiplied by."""
        alpha = float(_pattern_value(self.config["alpha_pattern"], name, self.config["lora_alpha"]))
        rank = self.rank(name)
        return alpha / math.sqrt(rank) if self.config["use_rslora"] else alpha / rank

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.folder.info(tensor).shape

    def read(self, tensor: str) -> Tensor:
        """A tensor of the adapter in float32."""
        return self.folder.read(tensor).float()


def is_adapter(path: Path) -> bool:
    """Whether the folder `path` holds an adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def open_adapter(path: Path) -> Adapter:
    """The LoRA adapter in the folder `path`.

    CheckpointError for files that are not sound, and for whatever cannot be merged: other methods than LoRA,
    settings that are not known, pickle files.
    """
    check_is_folder(path)
    if not is_adapter(path):
        raise CheckpointError(
            f"{shown(str(path))} has no {ADAPTER_CONFIG}; name the folder of a PEFT adapter"
        )
    config = _settings(read_json(path, ADAPTER_CONFIG, _MAX_BYTES))
    if not (path / ADAPTER_WEIGHTS).exists():
        raise CheckpointError(_why_no_weights(path))
    header = read_header(checked_file(path, ADAPTER_WEIGHTS))
    files = dict.fromkeys(header.tensors, ADAPTER_WEIGHTS)
    folder = Folder(path, {}, {ADAPTER_WEIGHTS: header}, files)
    branches, saved = _sorted(folder)
    if not files:
        raise CheckpointError(f"{ADAPTER_WEIGHTS} holds no tensors; {_AGAIN}")
    trained_on = config["base_model_name_or_path"]
    quantization = _stated_quantization(path)
    digest = file_hash(header.path)
    return Adapter(folder, config, tuple(branches), saved, digest, trained_on, quantization)


def _why_no_weights(path: Path) -> str:
    if (path / "adapter_model.bin").exists():
        return (
            f"{shown(str(path))} holds adapter_model.bin, a pickle, which can run code when read; where you "
            "trust it, load it once with PEFT and save_pretrained it, which writes adapter_model.safetensors"
        )
    return f"{shown(str(path))} has no {ADAPTER_WEIGHTS}; {_AGAIN}"


# --- settings ---------------------------------------------------------------------------------------


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter, checked, with PEFT's defaults."""
    method = found.get("peft_type")
    if method != "LORA":
        raise CheckpointError(
            f"{ADAPTER_CONFIG} has peft_type {_short(method)}; only LoRA adapters can be merged here. "
            "Merge it with PEFT"
        )
    if odd := sorted(key for key, value in found.items() if value and key not in _WITHOUT_EFFECT | _READ):
        raise CheckpointError(
            f"{ADAPTER_CONFIG} sets {some(odd)}, which changes more than a low-rank branch and cannot be "
            "merged here; merge it with PEFT, if it can be merged at all"
        )
    start = found.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} has init_lora_weights {_short(start)}, which changes the base, too. "
            "Save it as a plain LoRA adapter, with path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained; or, where BASE already is the changed base, set init_lora_weights to true there"
        )
    trained_on = found.get("base_model_name_or_path")
    config = {
        "r": found.get("r", 8),
        "lora_alpha": found.get("lora_alpha", 8),
        "rank_pattern": found.get("rank_pattern") or {},
        "alpha_pattern": found.get("alpha_pattern") or {},
        "target_parameters": found.get("target_parameters") or [],
        "use_dora": bool(found.get("use_dora", False)),
        "use_rslora": bool(found.get("use_rslora", False)),
        "base_model_name_or_path": trained_on if isinstance(trained_on, str) else "",
    }
    _check_settings(config)
    return config


def _check_settings(config: Mapping[str, Any]) -> None:
    for key, patterns in ((key, config[f"{key}_pattern"]) for key in ("rank", "alpha")):
        if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
            raise CheckpointError(f"{ADAPTER_CONFIG}: {key}_pattern maps no names to numbers; {_AGAIN}")
        for pattern in patterns:
            _check_pattern(pattern)
    for rank in (config["r"], *config["rank_pattern"].values()):
        if type(rank) is not int or not 1 <= rank <= 2**20:
            raise CheckpointError(f"{ADAPTER_CONFIG} has a rank of {_short(rank)}; {_AGAIN}")
    for alpha in (config["lora_alpha"], *config["alpha_pattern"].values()):
        if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
            raise CheckpointError(f"{ADAPTER_CONFIG} has a lora_alpha of {_short(alpha)}; {_AGAIN}")
    listed = config["target_parameters"]
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(f"{ADAPTER_CONFIG}: target_parameters is no list of names; {_AGAIN}")


def _check_pattern(pattern: str) -> None:
    """Refuse regular expressions that could take forever: they come from a file."""
    bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL)  # without what is escaped
    repeats = len(re.findall(r"(?<!\()[*+{?][?+]?", bare))
    groups = bare.count("(") if "|" in bare else 0
    # A repeated group, or one with flags, of which "verbose" would hide what is repeated.
    odd = re.search(r"\)\s*[*+{?]|\(\?(?!:)", bare)
    try:
        re.compile(f"(?:{pattern})")
    except (re.error, RecursionError, OverflowError):
        repeats = 99
    if len(pattern) > _MAX_PATTERN or repeats > 2 or groups > 2 or odd:
        raise CheckpointError(
            f"{ADAPTER_CONFIG}: the pattern {_short(pattern)} is no name and no simple expression; "
            "spell it out"
        )


def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that the end of `name` matches, as PEFT finds it."""
    found = (
        value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name) is not None
    )
    return next(found, default)


def _short(value: object) -> str:
    return shown(repr(value)[:200])


def _stated_quantization(path: Path) -> dict[str, Any] | None:
    """How the base was quantized, as PEFT notes it in the adapter's README.md; None where it says nothing."""
    if not (path / "README.md").is_file():
        return None
    try:
        text = read_text(path, "README.md", _MAX_BYTES)
    except CheckpointError:  # a card that cannot be read says nothing
        return None
    _, found, rest = text.partition("quantization config was used during training:\n")
    if not found:
        return None
    lines = (re.fullmatch(r"- (\w{1,60}): (\w{1,60})", line) for line in rest.splitlines()[:100])
    values = {line[1]: {"True": True, "False": False}.get(line[2], line[2]) for line in lines if line}
    config = {key: values[key] for key in _QUANTIZATION if key in values}
    return config if True in (values.get("load_in_4bit"), values.get("load_in_8bit")) else None


# --- tensors ----------------------------------------------------------------------------------------


def _sorted(folder: Folder) -> tuple[list[Branch], dict[str, str]]:
    """The branches of an adapter, and its tensors that replace one of the model: name there → name here."""
    parts: dict[tuple[str, int], dict[str, str]] = {}
    saved: dict[str, str] = {}
    odd = []
    if long := [tensor for tensor in folder.files if len(tensor) > _MAX_NAME]:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS} has {len(long)} tensors with names of more than {_MAX_NAME} characters: "
            f"{some(long)}; {_AGAIN}"
        )
    for tensor in folder.files:
        name = tensor.removeprefix(_PREFIX)
        found = next(((match, part) for one, part in _SUFFIXES if (match := one.fullmatch(name))), None)
        if name == tensor or (found is None and _FOREIGN.search(name)):
            odd.append(tensor)
        elif found is None:
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if plain in saved:
                raise CheckpointError(f"{ADAPTER_WEIGHTS}: {shown(tensor)} and {shown(saved[plain])} are one")
            saved[plain] = tensor
        else:
            module = found[0][1]
            depth = 0
            while module.endswith(".base_layer"):
                module, depth = module.removesuffix(".base_layer"), depth + 1
            parts.setdefault((module, depth), {})[found[1]] = tensor
        _check_dtype(folder, tensor)
    if odd:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS} has tensors that are of no LoRA adapter of a whole model: {some(odd)}; "
            "merge it with PEFT"
        )
    return [_branch(folder, module, depth, found) for (module, depth), found in parts.items()], saved


def _check_dtype(folder: Folder, tensor: str) -> None:
    dtype = TORCH_DTYPES.get(folder.info(tensor).dtype)
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS}, tensor {shown(tensor)} is {folder.info(tensor).dtype}; adapters are in "
            f"16 or 32 bits; {_AGAIN}"
        )


def _branch(folder: Folder, module: str, depth: int, parts: Mapping[str, str]) -> Branch:
    embedding = "embedding_a" in parts or "embedding_b" in parts
    a, b = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    if missing := [part for part in (a, b) if part not in parts]:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS}: {shown(module)} has no {_NAMES[missing[0]]}, but "
            f"{some(parts.values())}; the adapter is incomplete, {_AGAIN}"
        )
    if left := set(parts) - {a, b, "magnitude", *([] if embedding else ["bias"])}:
        raise CheckpointError(f"{ADAPTER_WEIGHTS}: {shown(parts[min(left)])} fits no branch; {_AGAIN}")
    shapes = folder.info(parts[a]).shape, folder.info(parts[b]).shape
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS}: A {list(shapes[0])} and B {list(shapes[1])} of {shown(module)} are no two "
            "matrices [rank, in] and [out, rank] (layers of convolutions cannot be merged here)"
        )
    return Branch(
        module, depth, parts[a], parts[b], embedding, parts.get("magnitude", ""), parts.get("bias", "")
    )


# --- arithmetic -------------------------------------------------------------------------------------


def shape_problem(adapter: Adapter, change: Change, name: str, shape: tuple[int, ...]) -> str | None:
    """Why `change` does not fit the tensor `name` of `shape`, in a sentence; None if it does."""
    if change.saved and adapter.shape(change.saved) != shape:
        return (
            f"{shown(change.saved)} is {list(adapter.shape(change.saved))}, but {shown(name)} of the base is "
            f"{list(shape)}: where tokens were added for training, resize the base and save it first"
        )
    if change.bias and adapter.shape(change.bias) != shape:
        return (
            f"{shown(change.bias)} is {list(adapter.shape(change.bias))}, the bias of the base {list(shape)}"
        )
    branch = change.branch
    if branch is None:
        return None
    if len(shape) not in (2, 3):
        return f"{shown(name)} is {list(shape)}, which no low-rank branch fits"
    count = shape[0] if len(shape) == 3 else 1
    out, into = reversed(shape[-2:]) if change.turned else shape[-2:]
    a, b = adapter.shape(branch.a), adapter.shape(branch.b)
    wanted = (count * change.rank, into), (out, count * change.rank)
    if (a, b) != wanted:
        return (
            f"A {list(a)} and B {list(b)} of {shown(branch.module)} do not fit {shown(name)} {list(shape)}, "
            f"which in rank {change.rank} takes {list(wanted[0])} and {list(wanted[1])}: the adapter is of "
            "another model, or its config of another adapter"
        )
    if branch.magnitude and (len(shape) == 3 or adapter.shape(branch.magnitude) != (out,)):
        return f"{shown(branch.magnitude)} is {list(adapter.shape(branch.magnitude))} and not [{out}]"
    return None


def merged(adapter: Adapter, change: Change, weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`weight` with `change`, computed in float32 and rounded once to `dtype`.

    weight: [out, in], [experts, out, in], either with the last two dimensions turned, or a bias [out].
    ValueError, naming the tensor, where a result is not finite.
    """
    base = adapter.read(change.saved) if change.saved else weight
    if change.bias:
        base = base.float() + adapter.read(change.bias) * change.scale
    result = torch.empty(weight.shape, dtype=dtype)
    if change.branch is None:
        result.copy_(base)
    else:
        _add(adapter, change, change.branch, base, result)
    if not _is_finite(result):
        raise ValueError(
            f"{shown(name)} is not finite in {dtype} any more when the adapter is merged; was it trained on "
            "another base, or is the base's dtype too narrow for it?"
        )
    return result


def _add(adapter: Adapter, change: Change, branch: Branch, base: Tensor, result: Tensor) -> None:
    """result = base + s B A, or DoRA's, a block of rows of one matrix at a time."""
    a, b = adapter.read(branch.a), adapter.read(branch.b)
    magnitude = adapter.read(branch.magnitude) if branch.magnitude else None
    matrices = list(_matrices(base, change.turned))
    # PEFT's layout: A holds the experts one behind the other, B has the expert as the fastest index.
    factors = [(a, b)]
    if base.dim() == 3:
        experts = b.view(b.shape[0], -1, len(matrices)).unbind(2)
        factors = list(zip(a.view(len(matrices), -1, a.shape[1]), experts, strict=True))
    for one, target, (down, up) in zip(matrices, _matrices(result, change.turned), factors, strict=True):
        rows = max(1, _BLOCK // max(one.shape[1], 1))
        for start in range(0, one.shape[0], rows):
            stop = start + rows
            new = one[start:stop] + (up[start:stop] @ down) * change.scale
            if magnitude is not None:
                new *= (magnitude[start:stop] / torch.linalg.norm(new, dim=1)).unsqueeze(1)
            target[start:stop] = new


def _matrices(tensor: Tensor, turned: bool) -> Iterator[Tensor]:
    """The matrices of a tensor, as views [out, in]."""
    whole = tensor.transpose(-1, -2) if turned else tensor
    yield from whole if whole.dim() == 3 else [whole]


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(block.isfinite().all()) for block in tensor.view(-1).split(_BLOCK))

"""What the tensors of a folder mean: which of them make up a weight, and what it is stored as.

Straight from names, headers and config; no model is built. Read are only the few bytes of bitsandbytes that
are text, and `fewbits.json` where `fewbits quantize` left one. Known are plain weights, bitsandbytes' 4 and
8 bit, fewbits' own schema, and, by names and sizes alone, what other quantizers write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import bitsandbytes
from fewbits.checkpoint.finish import SIDE_FILE
from fewbits.checkpoint.folder import Folder, read_json, some
from fewbits.checkpoint.safetensors import (
    ELEMENT_BITS,
    TORCH_DTYPES,
    CheckpointError,
    TensorInfo,
    shown,
)
from fewbits.config import FewbitsConfig
from fewbits.format import Format, packed_length
from fewbits.recipe import Recipe, Rule
from fewbits.tensor import DTYPES, QuantizedTensor

ROLES = ("embedding", "attention", "mlp", "experts", "router", "norm", "output head", "other")

_MAX_SIDE_BYTES = 100_000_000
_MAX_TEXT_BYTES = 4096
_MAX_HEIGHTS = 4096  # tried, when a weight's shape is to be found from the sizes of its parts

# The first pattern found in a tensor's name tells its role.
_ROLE_PATTERNS = tuple(
    (role, re.compile(pattern, re.IGNORECASE))
    for role, pattern in (
        ("norm", r"norm|(^|[._])ln([._\d]|$)"),
        ("router", r"(^|\.)(router|gate|shared_expert_gate)(\.|$)"),
        ("experts", r"(^|[._])experts?([._]|$)"),
        ("output head", r"(^|\.)(lm_head|embed_out|score|classifier|cls|qa_outputs)(\.|$)|^output\."),
        ("embedding", r"embed|(^|\.)(wte|wpe|shared)(\.|$)"),
        ("attention", r"attn|attention|(^|\.)([qkvo]_proj|qkv)(\.|$)"),
        ("mlp", r"mlp|ffn|feed_?forward|dense|(^|\.)(fc\d|w\d|(gate|up|down|gate_up)_proj)(\.|$)"),
    )
)
# Tensors that belong to a weight: who writes them, their names, the weight's name, what they are of it.
_PART_PATTERNS = tuple(
    (schema, re.compile(pattern), weight, part)
    for schema, pattern, weight, part in (
        (
            "bitsandbytes",
            r"(.+)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+)",
            r"\1",
            r"weight.\2",
        ),
        ("bitsandbytes", r"(.+)\.(SCB|weight_format)", r"\1.weight", r"\2"),
        ("fewbits", r"((?:.+\.)?weight)_(scale(?:_codes|_scale|_offset)?|zero|offset)", r"\1", r"\2"),
        (
            "fewbits",
            r"((?:.+\.)?)quantized_(\w+?)_(codes|scale(?:_codes|_scale|_offset)?|zero|offset)",
            r"\1\2",
            r"\3",
        ),
        ("other", r"(.+)\.(qweight|qzeros|scales|g_idx)", r"\1.weight", r"\2"),
        (
            "other",
            r"(.+\.weight)_(packed|scale|scale_inv|scale_2|zero_point|shape|g_idx|global_scale)",
            r"\1",
            r"\2",
        ),
        ("other", r"(.+)\.((?:input|activation)_(?:scale|global_scale|zero_point))", r"\1.weight", r"\2"),
        ("other", r"(.+)_(blocks|scales)", r"\1", r"\2"),
    )
)
# Where configs list the modules that stay as they are.
_SKIP_KEYS = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore", "ignored_layers")


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint.

    shape     None where no header tells it
    count     number of weights; from bytes and bits, padding included, where `shape` is None
    stored    the spelling of a Format, a safetensors dtype, or the method and bits of another quantizer
    nbytes    of all its parts
    reason    why it was kept, as far as config and names tell; empty where nothing is quantized
    problem   what is wrong with its parts, in a sentence; empty if they are whole and fit each other
    schema    "bitsandbytes", "fewbits", "other", or "" for a plain tensor
    parts     what it is of the weight → tensor name
    format    of a weight that fewbits can decode
    matrix    shape of one quantized tensor: the weight's or an expert's, or one that fits the parts as well
    experts   number of experts whose parts are stacked; 0: no stack
    """

    name: str
    shape: tuple[int, ...] | None
    count: int
    stored: str
    nbytes: int
    role: str
    reason: str = ""
    problem: str = ""
    schema: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    format: Format | None = None
    matrix: tuple[int, ...] = ()
    experts: int = 0

    @property
    def quantized(self) -> bool:
        return self.schema != ""

    @property
    def bits_per_weight(self) -> float:
        """All parts counted (0 when empty)."""
        return 8 * self.nbytes / self.count if self.count else 0.0


def stored_weights(folder: Folder) -> tuple[StoredWeight, ...]:
    """Every weight of `folder`, in the order of its files.

    CheckpointError for a quantization config of fewbits or a side file that cannot be read. Parts that are
    missing or do not fit make a weight's `problem`, no error.
    """
    recipe = _own_recipe(folder)
    weights: list[StoredWeight] = []
    for name, (schema, parts) in _grouped(folder).items():
        match schema:
            case "bitsandbytes":
                weights.append(_bitsandbytes(folder, name, parts))
            case "fewbits":
                weights.append(_fewbits(folder, name, parts, recipe))
            case "other" if (main := _main_part(parts)) is not None:
                weights.append(_other(folder, name, parts, main))
            case _:
                weights += [_plain(folder, tensor) for tensor in parts.values()]
    if not any(weight.quantized for weight in weights):
        return tuple(weights)
    keeping = _Keeping.of(folder, recipe)
    return tuple(weight if weight.quantized else keeping.explained(weight) for weight in weights)


def read_weight(folder: Folder, weight: StoredWeight) -> Iterator[QuantizedTensor]:
    """A weight that has a `format`, as its quantized tensors: one, or one per expert.

    ValueError, naming the weight, for values that no such weight can have.
    """
    assert weight.format is not None
    tensors = {part: folder.read(name) for part, name in weight.parts.items()}
    if weight.schema == "bitsandbytes":
        yield bitsandbytes.from_file(tensors, shown(weight.name.removesuffix(".weight")))
        return
    codes = weight.format.parts(weight.matrix)[0]
    stack = {part: tensor if weight.experts else tensor.unsqueeze(0) for part, tensor in tensors.items()}
    for index in range(weight.experts or 1):
        one = {part: tensor[index] for part, tensor in stack.items()}
        one["codes"] = one["codes"].view(-1).view(DTYPES[codes.dtype]).view(codes.shape)
        name = shown(weight.name) + (f"[{index}]" if weight.experts else "")
        yield QuantizedTensor.from_parts(one, weight.format, weight.matrix, name=name)


def role_of(name: str) -> str:
    """What a tensor of this name is for, one of `ROLES`."""
    return next((role for role, pattern in _ROLE_PATTERNS if pattern.search(name)), "other")


# --- which tensors belong together ------------------------------------------------------------------


def _grouped(folder: Folder) -> dict[str, tuple[str, dict[str, str]]]:
    """Weight name → (schema, part → tensor name); schema "" for a tensor on its own."""
    method = (folder.quantization or {}).get("quant_method")
    schemas = {"fewbits"} if method == "fewbits" else {"bitsandbytes"}
    if method not in (None, "fewbits", "bitsandbytes"):
        schemas.add("other")
    groups: dict[str, tuple[str, dict[str, str]]] = {}
    for name in folder.files:
        schema, weight, part = _place(name, schemas)
        known, parts = groups.get(weight, ("", {}))
        parts[name if part in parts else part] = name  # two of a kind: the second is a part that none knows
        groups[weight] = (schema or known, parts)
    for schema, parts in groups.values():
        if schema == "fewbits" and "weight" in parts and "codes" not in parts:
            parts["codes"] = parts.pop("weight")
    return groups


def _place(name: str, schemas: set[str]) -> tuple[str, str, str]:
    """(schema, weight, part) of a tensor; ("", its own name, "weight") if it is no part of another."""
    for schema, pattern, weight, part in _PART_PATTERNS:
        if schema in schemas and (found := pattern.fullmatch(name)):
            return schema, found.expand(weight), found.expand(part)
    return "", name, "weight"


def _plain(folder: Folder, name: str) -> StoredWeight:
    info = folder.info(name)
    method = (folder.quantization or {}).get("quant_method")
    problem = ""
    if method in ("fewbits", "bitsandbytes") and info.dtype in ("U8", "I8") and name.endswith(".weight"):
        problem = f"{shown(name)} has codes but no scales; the checkpoint is incomplete"
    return StoredWeight(name, info.shape, info.count, info.dtype, info.nbytes, role_of(name), problem=problem)


# --- bitsandbytes -----------------------------------------------------------------------------------


def _bitsandbytes(folder: Folder, name: str, parts: Mapping[str, str]) -> StoredWeight:
    infos = {part: folder.info(tensor) for part, tensor in parts.items()}
    bits = 8 if "SCB" in parts else 4
    count = 8 * infos["weight"].nbytes // bits if "weight" in infos else 0
    weight = StoredWeight(
        name=name,
        shape=None,
        count=count,
        stored=f"bitsandbytes {bits} bit",
        nbytes=sum(info.nbytes for info in infos.values()),
        role=role_of(name),
        schema="bitsandbytes",
        parts=parts,
    )
    try:
        tensors = {part: _outline(folder, info) for part, info in infos.items()}
        found = bitsandbytes.from_file(tensors, shown(name.removesuffix(".weight")))
    except (ValueError, RuntimeError) as error:  # torch refuses some casts of odd dtypes
        return replace(weight, problem=str(error))
    shape = tuple(found.shape)
    return replace(
        weight,
        shape=shape,
        count=math.prod(shape),
        stored=str(found.format),
        format=found.format,
        matrix=shape,
    )


def _outline(folder: Folder, info: TensorInfo) -> Tensor:
    """The tensor itself where it is text or a mark; else a tensor without data, of its dtype and shape."""
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"tensor {shown(info.name)} is {info.dtype}, which torch has not")
    if info.nbytes <= _MAX_TEXT_BYTES and re.search(r"\.(quant_state\.\w+|weight_format)$", info.name):
        return folder.read(info.name)
    return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")


# --- fewbits' own schema ----------------------------------------------------------------------------


def _own_recipe(folder: Folder) -> Recipe:
    """What fewbits' own quantization config chooses; no rules where the config is another's."""
    found = folder.quantization
    if found is None or found.get("quant_method") != "fewbits":
        return Recipe(())
    try:
        recipe: Recipe = FewbitsConfig.from_dict(found).to_recipe()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json, quantization_config: {error}") from error
    return recipe


def _fewbits(folder: Folder, name: str, parts: Mapping[str, str], recipe: Recipe) -> StoredWeight:
    infos = {part: folder.info(tensor) for part, tensor in parts.items()}
    formats = _formats(recipe, name)
    weight = StoredWeight(
        name=name,
        shape=None,
        count=infos["codes"].count if "codes" in infos else 0,
        stored=str(formats[0]) if formats else "unknown",
        nbytes=sum(info.nbytes for info in infos.values()),
        role=role_of(name),
        schema="fewbits",
        parts=parts,
    )
    problems = ["config.json names no format for it; give it one under modules"] * (not formats)
    for format in formats:
        try:
            return _in_format(weight, infos, format)
        except ValueError as error:
            problems.append(str(error))
    return replace(weight, problem=f"{shown(name)}: {problems[0]}")


def _formats(recipe: Recipe, name: str) -> list[Format]:
    """The formats that a weight stored quantized may have, likeliest first."""
    # As the loader does: what is stored quantized is, whatever a rule says that keeps it.
    schemes = [recipe.match(name.rpartition(".")[0]).scheme or recipe.rules[-1].scheme]
    if role_of(name) in ("embedding", "output head"):  # tied, it may be named as the other of the two
        schemes += [rule.scheme for rule in recipe.rules]
    return [scheme.weight for scheme in schemes if scheme is not None]


def _in_format(weight: StoredWeight, infos: Mapping[str, TensorInfo], format: Format) -> StoredWeight:
    """`weight` read as `format`; ValueError when parts are missing, unknown or of other sizes."""
    wanted = {part.name.replace(".", "_"): part.name for part in format.parts((1, 1))}
    if missing := [part for part in wanted if part not in infos]:
        raise ValueError(f"{format} needs {some(missing)} too; the checkpoint is incomplete")
    if unknown := [part for part in infos if part not in wanted]:
        raise ValueError(f"{format} has no {some(unknown)}; config.json is of another checkpoint")
    codes = infos["codes"]
    lead = codes.shape[:1] if codes.name != weight.name else ()
    shape = _fitting_shape(format, {wanted[part]: info for part, info in infos.items()}, lead)
    if shape is None:
        sizes = ", ".join(f"{part} {info.dtype} {list(info.shape)}" for part, info in infos.items())
        raise ValueError(f"{sizes} fit no weight in {format}; config.json is of another checkpoint")
    # How many rows there are is known only where each has scales of its own.
    known = format.group.rows == 1 and not format.group.flat
    return replace(
        weight,
        shape=(*lead, *shape) if known else None,
        count=math.prod(lead) * math.prod(shape),
        stored=str(format),
        parts={wanted[part]: tensor for part, tensor in weight.parts.items()},
        format=format,
        matrix=shape,
        experts=lead[0] if lead else 0,
    )


def _fitting_shape(
    format: Format, infos: Mapping[str, TensorInfo], lead: tuple[int, ...]
) -> tuple[int, ...] | None:
    """A shape whose parts in `format` are those of `infos`, each behind the dimensions `lead`."""
    codes = infos["codes"]
    nbytes = codes.nbytes // max(math.prod(lead), 1)
    scale = infos.get("scale", infos.get("scale.codes", codes))
    for shape in _shapes(format, nbytes, scale.shape[len(lead) :]):
        first, *rest = format.parts(shape)
        fits = first.nbytes == nbytes and all(
            infos[part.name].shape == (*lead, *part.shape)
            and TORCH_DTYPES.get(infos[part.name].dtype) == DTYPES[part.dtype]
            for part in rest
        )
        if fits:
            return shape
    return None


def _shapes(format: Format, nbytes: int, grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes that `nbytes` of codes may hold if their scale is `grid`, the largest first."""
    bits, group = format.codebook.bits, format.group
    if group.flat:
        most = 8 * nbytes // bits
        yield from ((count,) for count in range(most, most - 8 // bits, -1) if count >= 0)
        return
    if len(grid) != 2:
        return
    heights: Iterable[int] = range(grid[0] * group.rows, (grid[0] - 1) * group.rows, -1)
    for rows in islice(heights, _MAX_HEIGHTS) if group.rows else [1]:
        if rows < 1 or nbytes % rows:
            continue
        columns = 8 * (nbytes // rows) // bits
        while columns > 0 and packed_length(columns, bits) == nbytes // rows:
            yield rows, columns
            columns -= 1


# --- other quantizers -------------------------------------------------------------------------------


def _main_part(parts: Mapping[str, str]) -> str | None:
    """The part that holds the codes."""
    return next((part for part in ("qweight", "packed", "blocks", "weight") if part in parts), None)


def _other(folder: Folder, name: str, parts: Mapping[str, str], main: str) -> StoredWeight:
    config = folder.quantization or {}
    codes = folder.info(parts[main])
    if main == "weight" and codes.dtype != "U8":
        bits = ELEMENT_BITS[codes.dtype]
    else:
        bits = 4 if main in ("blocks", "weight") else _stated_bits(config)
    return StoredWeight(
        name=name,
        shape=codes.shape if main == "weight" and codes.dtype != "U8" else None,
        count=8 * codes.nbytes // bits,
        stored=f"{shown(str(config.get('quant_method')))} {bits} bit",
        nbytes=sum(folder.info(tensor).nbytes for tensor in parts.values()),
        role=role_of(name),
        schema="other",
        parts=parts,
    )


def _stated_bits(config: Mapping[str, Any]) -> int:
    """Bits per code that another quantizer's config states; 4 where it does not."""
    groups = config.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    stated = [config.get("bits"), config.get("w_bit")]
    stated += [weights.get("num_bits")] if isinstance(weights, dict) else []
    return next((bits for bits in stated if type(bits) is int and 1 <= bits <= 8), 4)


# --- why weights were kept --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Keeping:
    """What can tell why a weight was kept: the side file, skip lists, the recipe, tied embeddings."""

    noted: Mapping[str, str]
    rules: tuple[Rule, ...]
    tied: bool
    linear_only: bool

    @staticmethod
    def of(folder: Folder, recipe: Recipe) -> _Keeping:
        rules = [replace(rule, reason=f"{rule.reason}: skip") for rule in recipe.rules if rule.scheme is None]
        config = folder.quantization or {}
        for key in _SKIP_KEYS:
            listed = config.get(key)
            words = [word for word in listed if isinstance(word, str)] if isinstance(listed, list) else []
            patterns = [word.removeprefix("re:") for word in words]
            rules += [Rule(word, None, f"named in {key}") for word in patterns if _is_pattern(word)]
        tied = bool(folder.config.get("tie_word_embeddings", False))
        heads = any(role_of(name) == "output head" for name in folder.files)
        linear_only = config.get("quant_method") == "bitsandbytes"
        return _Keeping(_noted_reasons(folder), tuple(rules), tied and not heads, linear_only)

    def explained(self, weight: StoredWeight) -> StoredWeight:
        """`weight` with the reason why it was kept."""
        return replace(weight, reason=self.noted.get(weight.name) or self._why(weight))

    def _why(self, weight: StoredWeight) -> str:
        dimensions = len(weight.shape or ())
        if dimensions < 2:
            return f"{dimensions}-dimensional"
        layer = weight.name.rpartition(".")[0]
        if rule := next((rule for rule in self.rules if rule.matches(layer)), None):
            return rule.reason
        if weight.role in ("embedding", "output head"):
            tied = " (tied)" if weight.role == "embedding" and self.tied else ""
            return f"{weight.role}{tied}: kept unless named"
        if weight.role == "experts" and self.linear_only:
            return "bitsandbytes quantizes linear layers only"
        if weight.role in ("router", "norm"):
            return weight.role
        return "no linear layer" if dimensions > 2 else "the files do not say"


def _noted_reasons(folder: Folder) -> dict[str, str]:
    """Weight name → reason, as `fewbits quantize` noted them beside its output; empty without that file."""
    if not (folder.path / SIDE_FILE).exists():
        return {}
    listed = read_json(folder.path, SIDE_FILE, _MAX_SIDE_BYTES).get("weights")
    try:
        found = {entry["name"]: entry["reason"] for entry in listed or ()}
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise CheckpointError(f"{SIDE_FILE}: weights is no list of names and reasons; remove the file")
    return found


def _is_pattern(text: str) -> bool:
    try:
        re.compile(f"(?:{text})")
    except re.error:
        return False
    return True

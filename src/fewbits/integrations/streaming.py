"""A checkpoint's folder → the units of a job that quantizes it, without ever building the model.

The model is laid out on the meta device, its layers are chosen as `from_pretrained` chooses them, and every
tensor takes the way through transformers' conversions that it takes there, in shape first, with values when
its turn comes. So the files hold the bytes that loading on the fly and `save_pretrained` would give.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fewbits import model as placing
from fewbits.checkpoint import bitsandbytes as schema
from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.job import Made, Unit
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.integrations.architecture import clean_config, empty_model
from fewbits.integrations.conversion import keep_codes_together
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantModule
from fewbits.report import Report, report
from fewbits.tensor import DTYPES, QuantizedTensor

_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint.

    units: in the order of the new files; config: the new config.json; report: every weight of the result;
    largest: elements of the largest tensor, experts counted one by one; modules: names of the modules that
    could be quantized.
    """

    units: tuple[Unit, ...]
    config: dict[str, Any]
    report: Report
    largest: int
    modules: tuple[str, ...]


def plan(
    folder: Folder,
    config: BitsAndBytesConfig | FewbitsConfig | Callable[[torch.dtype], BitsAndBytesConfig | FewbitsConfig],
) -> Plan:
    """How to quantize the checkpoint in `folder` by `config` (or by what `config` gives for the model's
    dtype).

    CheckpointError for a checkpoint that is quantized already, and for tensors that are missing, unexpected
    or of another shape than the architecture says; ValueError for a config that does not fit the model.
    """
    if folder.quantization is not None:
        method = folder.quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder.path} is quantized already ({method}); start from the original checkpoint"
        )
    model = empty_model(folder.config, folder.first_dtype or torch.float32, len(folder.files))
    chosen = config if isinstance(config, BitsAndBytesConfig | FewbitsConfig) else config(model.dtype)
    groups = _groups(folder, model)
    _check_ties(folder, model, groups)
    quantizer = FewbitsQuantizer(chosen, pre_quantized=False)
    if quantizer.is_qat_trainable:
        raise ValueError("llm_int8_has_fp16_weight=True keeps weights as they are; leave it out for int8")
    quantizer._process_model_before_weight_loading(model)
    keep_codes_together(model)
    units = tuple(_units(folder, model, quantizer, groups))
    stored = json.loads(json.dumps(quantizer.quantization_config.to_dict(), default=str))
    new = clean_config(folder.config) | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": stored,
    }
    new.pop("torch_dtype", None)
    largest = max((piece.elements for group in groups for piece in group.pieces()), default=0)
    leaves = (QuantModule, nn.Linear, nn.Embedding)
    modules = tuple(name for name, one in model.named_modules() if isinstance(one, leaves))
    return Plan(units, new, _report(model), largest, modules)


@dataclass(frozen=True)
class _Group:
    """Source tensors that become one or more tensors of the model together.

    transform: how; targets: source name → (name in the model, pattern, dtype to cast to).
    """

    first: str
    transform: Any
    targets: Mapping[str, tuple[str, str, torch.dtype]]
    elements: int

    def pieces(self) -> list[_Group]:
        """The same for each expert on its own, where the conversion stacks experts and does not mix them."""
        operations = getattr(self.transform, "operations", ())
        sources: dict[str, list[str]] = {}
        for source, (_, pattern, _) in self.targets.items():
            sources.setdefault(pattern, []).append(source)
        counts = {len(names) for names in sources.values()}
        if not operations or not all(_stacks_experts(one) for one in operations) or len(counts) != 1:
            return [self]
        return [
            replace(
                self,
                targets={source: self.targets[source] for source in experts},
                elements=self.elements // len(sources[self.targets[experts[0]][1]]),
            )
            for experts in zip(*sources.values(), strict=True)
        ]

    def convert(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name in the model → tensor."""
        transform = copy.deepcopy(self.transform)
        for source, (target, pattern, dtype) in self.targets.items():
            tensor = tensors[source]
            transform.add_tensor(target, source, pattern, lambda tensor=tensor, dtype=dtype: tensor.to(dtype))
        converted = transform.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _stacks_experts(operation: Any) -> bool:
    """Whether an operation of a conversion leaves what belongs to one expert, the first dimension, to
    itself."""
    if isinstance(operation, MergeModulelist):
        return bool(operation.dim == 0)
    if isinstance(operation, Concatenate):
        return bool(operation.dim > 0)
    if isinstance(operation, Transpose) and not operation.check_dims:  # which looks at whole shapes
        return bool(min(operation.dim0, operation.dim1) > 0)
    return False


def _groups(folder: Folder, model: Any) -> list[_Group]:
    """Every tensor of the folder sent the way that transformers' loader would send it."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    transforms: dict[str, Any] = {}
    targets: dict[str, dict[str, tuple[str, str, torch.dtype]]] = {}
    unexpected = []
    casts = _Casts(model)
    for source in sorted(folder.files, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if target not in known and source in known:
            target, pattern = rename_source_key(source, [], [], prefix, known)
        if target not in known:
            unexpected.append((source, target))
            continue
        if pattern is None:
            transforms.setdefault(target, WeightRenaming(source, target))
        else:
            transforms.setdefault(target, copy.deepcopy(by_pattern[pattern]))
        targets.setdefault(target, {})[source] = (
            target,
            pattern or source,
            casts.dtype(target, known[target]),
        )
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    _refuse_unexpected(model, folder, unexpected)
    groups = [
        _Group(first, transforms[first], found, sum(folder.info(source).count for source in found))
        for first, found in targets.items()
    ]
    _check_shapes(folder, model, groups, known)
    return groups


class _Casts:
    """The dtype that transformers gives each tensor: the model's, or float32 where the model insists on
    it."""

    def __init__(self, model: Any) -> None:
        kept = model._get_dtype_plan(model.dtype)
        self._in_float32 = build_glob_alternation(list(kept))[0] if kept else None

    def dtype(self, name: str, empty: Tensor) -> torch.dtype:
        if self._in_float32 is not None and self._in_float32.search(name):
            return torch.float32
        return empty.dtype


def _refuse_unexpected(model: Any, folder: Folder, unexpected: list[tuple[str, str]]) -> None:
    patterns = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    }
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    left = [source for source, target in unexpected if ignored.search(target) is None]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"{folder.files[left[0]]}, tensor {left[0]}{more}: {type(model).__name__} has no such tensor. "
            'Check "architectures" in config.json, or load the model with transformers and save it once'
        )


def _check_shapes(folder: Folder, model: Any, groups: list[_Group], known: Mapping[str, Tensor]) -> None:
    """Every tensor of the model must come out of the conversions, in its shape."""
    found: set[str] = set()
    for group in groups:
        source = next(iter(group.targets))
        try:
            converted = group.convert(model, _empty_sources(folder, group))
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{folder.files[source]}, tensor {source} and what belongs to it do not give {group.first}: "
                f"{str(error).splitlines()[0]}; the checkpoint is incomplete, or belongs to another config"
            ) from error
        for name, tensor in converted.items():
            found.add(name)
            if name in known and tensor.shape != known[name].shape:
                raise CheckpointError(
                    f"{folder.files[source]}, tensor {source} gives {name} {list(tensor.shape)}, but "
                    f"config.json says {list(known[name].shape)}; the config belongs to another model"
                )
    ties = model.all_tied_weights_keys
    found |= {name for pair in ties.items() for name in pair if set(pair) & found}
    patterns = model._keys_to_ignore_on_load_missing or ()
    missing = [
        name for name in known if name not in found and not any(re.search(one, name) for one in patterns)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder.path}: tensor {missing[0]}{more} of {type(model).__name__} is missing in the weight "
            "files; the checkpoint is incomplete, get it again from its source"
        )


def _empty_sources(folder: Folder, group: _Group) -> dict[str, Tensor]:
    """The source tensors of a group on the meta device. CheckpointError for a dtype that torch has not."""
    empty = {}
    for source in group.targets:
        info = folder.info(source)
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{folder.files[source]}, tensor {source}: torch has no dtype {info.dtype}")
        empty[source] = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
    return empty


def _check_ties(folder: Folder, model: Any, groups: list[_Group]) -> None:
    """Tied tensors that are both in the files must be equal; one of them is stored then."""
    sources = {group.first: next(iter(group.targets)) for group in groups if len(group.targets) == 1}
    for target, source in model.all_tied_weights_keys.items():
        if target in sources and source in sources:
            one, other = folder.read(sources[target]), folder.read(sources[source])
            if one.dtype != other.dtype or not torch.equal(one, other):
                raise CheckpointError(
                    f"{sources[target]} and {sources[source]} have different values, but config.json ties "
                    'them; set "tie_word_embeddings": false in it'
                )


def _units(folder: Folder, model: Any, quantizer: FewbitsQuantizer, groups: list[_Group]) -> Iterator[Unit]:
    """One unit per group, in the order of the model's own tensors."""
    order = {name: index for index, name in enumerate(model.state_dict())}
    ties = dict(model.all_tied_weights_keys)
    present = {group.first for group in groups}
    renamed = {target: source for target, source in ties.items() if source not in present}
    stored = [group for group in groups if group.first not in ties or group.first in renamed]
    works = [
        _Work(model, quantizer, group, renamed)
        for group in sorted(stored, key=lambda group: order.get(group.first, len(order)))
    ]
    names = _file_names(folder, model, works)
    for work in works:
        group, work = work.group, replace(work, names=names)
        empty = work.outputs(_empty_sources(folder, group))
        outputs = {name: (_SPELLINGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in empty.items()}
        opened = frozenset(name for name in outputs if schema.has_open_length(name))
        pieces = group.pieces() if work.quantizes(group.first) else [group]
        for index, piece in enumerate(pieces):
            part = replace(work, group=piece)
            cost = _cost(folder, piece)
            if work.quantizes(group.first):  # the result, and that decoded again for its error
                cost += sum(tensor.nbytes for tensor in empty.values()) // len(pieces)
                cost += _cast_bytes(folder, piece)
            yield Unit(tuple(piece.targets), outputs, part.make, cost, opened, (index, len(pieces)))


def _file_names(folder: Folder, model: Any, works: list[_Work]) -> dict[str, str]:
    """Name in the model → name in the files, of all tensors that are only renamed.

    Names are reverted for the whole model at once, as saving does: some rules look at several. ValueError
    where what is converted, too, would come out otherwise unit by unit.
    """
    whole: dict[str, Tensor] = {}
    for work in works:
        whole |= work.tensors(_empty_sources(folder, work.group))
    reverted: dict[str, Tensor] = revert_weight_conversion(model, whole)
    by_identity = {id(tensor): name for name, tensor in reverted.items()}
    names = {name: by_identity[id(tensor)] for name, tensor in whole.items() if id(tensor) in by_identity}
    apart: set[str] = set()
    for work in works:
        apart |= set(replace(work, names=names).outputs(_empty_sources(folder, work.group)))
    if apart != set(reverted):
        odd = min(apart ^ set(reverted))
        raise ValueError(
            f"the files of {type(model).__name__} cannot be written one tensor at a time ({odd}); quantize "
            "it while loading, and save_pretrained it"
        )
    return names


def _cost(folder: Folder, group: _Group) -> int:
    """Bytes of memory that a group takes until it is a tensor of the model: what is read, cast and merged."""
    infos = [(folder.info(source), dtype) for source, (_, _, dtype) in group.targets.items()]
    cast = sum(info.count * dtype.itemsize for info, dtype in infos if TORCH_DTYPES[info.dtype] != dtype)
    merged = 2 * _cast_bytes(folder, group) if isinstance(group.transform, WeightConverter) else 0
    return sum(info.nbytes for info, _ in infos) + cast + merged + _WORKING


def _cast_bytes(folder: Folder, group: _Group) -> int:
    """Bytes of what a group gives in the model's dtype."""
    return sum(folder.info(source).count * dtype.itemsize for source, (_, _, dtype) in group.targets.items())


_WORKING = 2**25  # bytes of temporaries, whatever the size of a tensor


@dataclass(frozen=True)
class _Work:
    """Source tensors of one group → tensors of the new files."""

    model: Any
    quantizer: FewbitsQuantizer
    group: _Group
    renamed: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)

    def make(self, tensors: Mapping[str, Tensor]) -> Made:
        squares: dict[str, tuple[float, float]] = {}
        with torch.inference_mode():
            made = self.outputs(tensors, squares)
        return Made(made, squares)

    def quantizes(self, target: str) -> bool:
        """Whether a tensor of the model is to be quantized."""
        path, _, weight = self.renamed.get(target, target).rpartition(".")
        layer = self.model.get_submodule(path)
        return isinstance(layer, QuantModule) and weight in layer.weights()

    def outputs(
        self, tensors: Mapping[str, Tensor], squares: dict[str, tuple[float, float]] | None = None
    ) -> dict[str, Tensor]:
        """Name in the new files → tensor; of meta tensors, their shapes. Notes errors in `squares`."""
        made = self.tensors(tensors, squares)
        result = {self.names[name]: tensor for name, tensor in made.items() if name in self.names}
        rest = {name: tensor for name, tensor in made.items() if name not in self.names}
        return result | revert_weight_conversion(self.model, rest) if rest else result

    def tensors(
        self, tensors: Mapping[str, Tensor], squares: dict[str, tuple[float, float]] | None = None
    ) -> dict[str, Tensor]:
        """As `outputs`, under the names that the model gives them."""
        result: dict[str, Tensor] = {}
        for target, value in self.group.convert(self.model, tensors).items():
            name = self.renamed.get(target, target)
            path, _, weight = name.rpartition(".")
            layer = self.model.get_submodule(path)
            if not self.quantizes(target):
                result[name] = value
                continue
            if value.is_meta:
                quantized = [_empty(layer, weight) for _ in layer.matrices(value)]
            else:
                quantized, error, total = placing.quantized(layer, weight, value, name)
                if squares is not None:
                    squares[name] = (error, total)
            if self.quantizer.in_bitsandbytes_files:
                stored = schema.to_file(quantized[0], layer.scheme.storage_dtype)
            else:
                stored = layer.stored(weight, quantized)
            result |= {f"{path}.{key}": tensor for key, tensor in stored.items()}
        return result


def _empty(layer: QuantModule, weight: str) -> QuantizedTensor:
    """A quantized weight of `layer` on the meta device."""
    shape, dtype = layer.weights()[weight]
    format = layer.scheme.weight
    parts = [torch.empty(part.shape, dtype=DTYPES[part.dtype], device="meta") for part in format.parts(shape)]
    return QuantizedTensor.from_parts(parts, format, shape, dtype)


def _report(model: Any) -> Report:
    """The report of the result, where layers do not wait for weights any more."""
    casts = _Casts(model)
    model = copy.deepcopy(model)  # the conversions of transformers ask for what waits
    for name, parameter in list(model.named_parameters()):
        if parameter.is_floating_point() and casts.dtype(name, parameter) != parameter.dtype:
            path, _, last = name.rpartition(".")
            kept = nn.Parameter(parameter.to(casts.dtype(name, parameter)), requires_grad=False)
            model.get_submodule(path).register_parameter(last, kept)
    for _, layer in model.named_modules():
        if isinstance(layer, QuantModule):
            for weight in layer.weights():
                stack = len(getattr(layer, layer.part_names(weight)["codes"])) if layer.is_stack else 1
                layer._parameters.pop(weight, None)
                layer.store(layer.stored(weight, [_empty(layer, weight)] * stack))
    for target, source in placing.tied_modules(model):
        placing.share(model, target, source)
    return report(model)

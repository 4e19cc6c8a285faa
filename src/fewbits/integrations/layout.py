"""Tensors of a checkpoint's files ↔ tensors of the model, one group at a time.

The model is laid out on the meta device, and every tensor takes the way through transformers' conversions
that it takes on loading, and back the one it takes on saving: in shape first, with values when its turn
comes. What is done to a tensor in between is a `Work`.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
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

from fewbits.checkpoint import bitsandbytes as schema
from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.job import Made, Unit
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError

_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_WORKING = 2**25  # bytes of temporaries, whatever the size of a tensor


@dataclass(frozen=True)
class Group:
    """Source tensors that become one or more tensors of the model together.

    transform: how; targets: source name → (name in the model, pattern, dtype to cast to).
    """

    first: str
    transform: Any
    targets: Mapping[str, tuple[str, str, torch.dtype]]
    elements: int

    def pieces(self) -> list[Group]:
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


def groups_of(folder: Folder, model: Any) -> list[Group]:
    """Every tensor of the folder sent the way that transformers' loader would send it."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    transforms: dict[str, Any] = {}
    targets: dict[str, dict[str, tuple[str, str, torch.dtype]]] = {}
    unexpected = []
    casts = Casts(model)
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
        Group(first, transforms[first], found, sum(folder.info(source).count for source in found))
        for first, found in targets.items()
    ]
    _check_shapes(folder, model, groups, known)
    return groups


class Casts:
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


def _check_shapes(folder: Folder, model: Any, groups: list[Group], known: Mapping[str, Tensor]) -> None:
    """Every tensor of the model must come out of the conversions, in its shape."""
    found: set[str] = set()
    for group in groups:
        source = next(iter(group.targets))
        try:
            converted = group.convert(model, empty_sources(folder, group))
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


def empty_sources(folder: Folder, group: Group) -> dict[str, Tensor]:
    """The source tensors of a group on the meta device. CheckpointError for a dtype that torch has not."""
    empty = {}
    for source in group.targets:
        info = folder.info(source)
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{folder.files[source]}, tensor {source}: torch has no dtype {info.dtype}")
        empty[source] = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
    return empty


def check_ties(folder: Folder, model: Any, groups: list[Group]) -> None:
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


@dataclass(frozen=True)
class Work(ABC):
    """Source tensors of one group → tensors of the new files.

    renamed: tied tensor that is in the files → the one that the model takes it from; names: name in the model
    → name in the new files, of all tensors that are only renamed.
    """

    model: Any
    group: Group
    renamed: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def stored(
        self, name: str, value: Tensor, squares: dict[str, tuple[float, float]] | None
    ) -> dict[str, Tensor]:
        """What becomes of the tensor `name` of the model: name → tensor; of a meta tensor, the shapes.
        Notes errors in `squares`."""

    def pieces(self) -> list[Work]:
        """The parts that may be done one by one."""
        return [self]

    def cost(self, folder: Folder, outputs: Mapping[str, Tensor], pieces: int) -> int:
        """Bytes of memory that one of so many pieces takes."""
        return cost_of(folder, self.group)

    def name_in_model(self, target: str) -> str:
        """`target`, or what it is tied to where only `target` is in the files."""
        return self.renamed.get(target, target)

    def make(self, tensors: Mapping[str, Tensor]) -> Made:
        squares: dict[str, tuple[float, float]] = {}
        with torch.no_grad():
            made = self.outputs(tensors, squares)
        return Made(made, squares)

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
            result |= self.stored(self.name_in_model(target), value, squares)
        return result


def stored_groups(model: Any, groups: Iterable[Group]) -> tuple[list[Group], dict[str, str]]:
    """The groups that the new files hold, in the order of the model's own tensors: of tied ones, one. And
    `renamed` of `Work`."""
    groups = list(groups)
    order = {name: index for index, name in enumerate(model.state_dict())}
    ties = dict(model.all_tied_weights_keys)
    present = {group.first for group in groups}
    renamed = {target: source for target, source in ties.items() if source not in present}
    stored = [group for group in groups if group.first not in ties or group.first in renamed]
    return sorted(stored, key=lambda group: order.get(group.first, len(order))), renamed


def named(folder: Folder, model: Any, works: list[Work]) -> list[Work]:
    """`works` that know the names of the new files' tensors, which depend on all of them."""
    names = _file_names(folder, model, works)
    return [replace(work, names=names) for work in works]


def units_of(folder: Folder, works: Iterable[Work]) -> Iterator[Unit]:
    """The units of a job that does `works`, which are `named`, in their order."""
    for work in works:
        empty = work.outputs(empty_sources(folder, work.group))
        outputs = {name: (_SPELLINGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in empty.items()}
        opened = frozenset(name for name in outputs if schema.has_open_length(name))
        pieces = work.pieces()
        for index, piece in enumerate(pieces):
            cost = piece.cost(folder, empty, len(pieces))
            place = (index, len(pieces))
            yield Unit(tuple(piece.group.targets), outputs, piece.make, cost, opened, place)


def _file_names(folder: Folder, model: Any, works: list[Work]) -> dict[str, str]:
    """Name in the model → name in the files, of all tensors that are only renamed.

    Names are reverted for the whole model at once, as saving does: some rules look at several. ValueError
    where what is converted, too, would come out otherwise unit by unit.
    """
    whole: dict[str, Tensor] = {}
    for work in works:
        whole |= work.tensors(empty_sources(folder, work.group))
    reverted: dict[str, Tensor] = revert_weight_conversion(model, whole)
    by_identity = {id(tensor): name for name, tensor in reverted.items()}
    names = {name: by_identity[id(tensor)] for name, tensor in whole.items() if id(tensor) in by_identity}
    apart: set[str] = set()
    for work in works:
        apart |= set(replace(work, names=names).outputs(empty_sources(folder, work.group)))
    if apart != set(reverted):
        odd = min(apart ^ set(reverted))
        raise ValueError(
            f"the files of {type(model).__name__} cannot be written one tensor at a time ({odd}); load it "
            "with transformers, and save_pretrained it"
        )
    return names


def cost_of(folder: Folder, group: Group) -> int:
    """Bytes of memory that a group takes until it is a tensor of the model: what is read, cast and merged."""
    infos = [(folder.info(source), dtype) for source, (_, _, dtype) in group.targets.items()]
    cast = sum(info.count * dtype.itemsize for info, dtype in infos if TORCH_DTYPES[info.dtype] != dtype)
    merged = 2 * cast_bytes(folder, group) if isinstance(group.transform, WeightConverter) else 0
    return sum(info.nbytes for info, _ in infos) + cast + merged + _WORKING


def cast_bytes(folder: Folder, group: Group) -> int:
    """Bytes of what a group gives in the model's dtype."""
    return sum(folder.info(source).count * dtype.itemsize for source, (_, _, dtype) in group.targets.items())

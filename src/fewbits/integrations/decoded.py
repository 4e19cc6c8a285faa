"""A quantized checkpoint's folder, read as the 16-bit one that its weights decode to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError, TensorInfo, shown
from fewbits.checkpoint.stored import StoredWeight, read_weight, stored_weights
from fewbits.integrations.architecture import empty_model
from fewbits.nn import is_transposed

_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class _Decodable:
    """A quantized weight: how it is stored, and what it decodes to. turned: that is [..., in, out]."""

    stored: StoredWeight
    shape: tuple[int, ...]
    turned: bool


@dataclass(frozen=True)
class DecodedFolder(Folder):
    """A folder whose quantized weights are decoded as they are read; `raw` is the same as it is stored."""

    raw: Folder
    dtype: torch.dtype
    decodable: Mapping[str, _Decodable]

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of the decoded tensor; where it starts means nothing."""
        if name not in self.decodable:
            return self.raw.info(name)
        shape = self.decodable[name].shape
        return TensorInfo(name, _SPELLINGS[self.dtype], shape, 0, self.dtype.itemsize * math.prod(shape))

    def read(self, name: str) -> Tensor:
        if name not in self.decodable:
            return self.raw.read(name)
        one = self.decodable[name]
        result = torch.empty(one.shape, dtype=self.dtype)
        whole = result.transpose(-1, -2) if one.turned else result
        matrices = whole if whole.dim() == 3 else [whole]
        for matrix, quantized in zip(matrices, read_weight(self.raw, one.stored), strict=True):
            matrix.copy_(quantized.dequantize(self.dtype).view(matrix.shape))
        return result

    def check(self, name: str, advance: Callable[[int], object]) -> None:
        for part in self.decodable[name].stored.parts.values() if name in self.decodable else [name]:
            self.raw.check(part, advance)

    @property
    def first_dtype(self) -> torch.dtype | None:
        return self.dtype


def decoded_folder(folder: Folder) -> DecodedFolder:
    """`folder`, which is quantized, as the 16-bit checkpoint that it decodes to.

    CheckpointError for weights that fewbits cannot decode or that do not fit the model of the config.
    """
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    model = empty_model(config, torch.bfloat16, len(folder.files))
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    files, decodable = dict[str, str](), dict[str, _Decodable]()
    for weight in stored_weights(folder):
        if weight.problem:
            raise CheckpointError(f"{folder.path}: {weight.problem}")
        if not weight.quantized:
            files[weight.name] = folder.files[weight.name]
            continue
        if weight.format is None:
            raise CheckpointError(
                f"{folder.path}: {shown(weight.name)} is stored as {weight.stored}, which cannot be decoded "
                "here; give the original weights"
            )
        target, _ = rename_source_key(weight.name, renamings, [], model.base_model_prefix, known)
        decodable[weight.name] = _decodable(model, weight, target if target in known else None)
        files[weight.name] = folder.files[next(iter(weight.parts.values()))]
    return DecodedFolder(folder.path, config, folder.headers, files, folder, model.dtype, decodable)


def _decodable(model: Any, weight: StoredWeight, target: str | None) -> _Decodable:
    """target: the model's name of the tensor; None for one of several that it is made of."""
    if target is None:
        if weight.shape is None:
            raise CheckpointError(f"{shown(weight.name)}: {type(model).__name__} has no such weight")
        return _Decodable(weight, tuple(weight.shape), False)
    layer = model.get_submodule(target.rpartition(".")[0])
    shape = tuple(model.state_dict()[target].shape)
    stacked = len(shape) == 3
    turned = bool(getattr(layer, "is_transposed", False)) if stacked else is_transposed(type(layer))
    if math.prod(shape) != weight.count or (stacked and shape[0] != weight.experts):
        raise CheckpointError(
            f"{shown(weight.name)} has {weight.count} weights, but config.json says {list(shape)}; the "
            "config belongs to another model"
        )
    return _Decodable(weight, shape, turned)

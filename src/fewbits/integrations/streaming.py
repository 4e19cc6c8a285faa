"""A checkpoint's folder → the units of a job that quantizes it, without ever building the model.

The model is laid out on the meta device, its layers are chosen as `from_pretrained` chooses them, and every
tensor takes the way through transformers' conversions that it takes there, in shape first, with values when
its turn comes. So the files hold the bytes that loading on the fly and `save_pretrained` would give.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import model as placing
from fewbits.checkpoint import bitsandbytes as schema
from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.job import Unit
from fewbits.checkpoint.safetensors import CheckpointError
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.integrations.architecture import clean_config, empty_model
from fewbits.integrations.conversion import keep_codes_together
from fewbits.integrations.layout import (
    Casts,
    Work,
    cast_bytes,
    check_ties,
    groups_of,
    named,
    stored_groups,
    units_of,
)
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantModule
from fewbits.report import Report, report
from fewbits.tensor import DTYPES, QuantizedTensor


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
    groups = groups_of(folder, model)
    check_ties(folder, model, groups)
    quantizer = FewbitsQuantizer(chosen, pre_quantized=False)
    if quantizer.is_qat_trainable:
        raise ValueError("llm_int8_has_fp16_weight=True keeps weights as they are; leave it out for int8")
    quantizer._process_model_before_weight_loading(model)
    keep_codes_together(model)
    stored, renamed = stored_groups(model, groups)
    works: list[Work] = [_Work(model, group, renamed, quantizer) for group in stored]
    units = tuple(units_of(folder, named(folder, model, works)))
    settings = json.loads(json.dumps(quantizer.quantization_config.to_dict(), default=str))
    new = clean_config(folder.config) | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": settings,
    }
    new.pop("torch_dtype", None)
    largest = max((piece.elements for group in groups for piece in group.pieces()), default=0)
    leaves = (QuantModule, nn.Linear, nn.Embedding)
    modules = tuple(name for name, one in model.named_modules() if isinstance(one, leaves))
    return Plan(units, new, _report(model), largest, modules)


@dataclass(frozen=True)
class _Work(Work):
    """Quantizes what the quantizer chose."""

    quantizer: FewbitsQuantizer

    def quantizes(self) -> bool:
        """Whether the group gives a tensor that is to be quantized."""
        return self._layer(self.name_in_model(self.group.first)) is not None

    def _layer(self, name: str) -> QuantModule | None:
        path, _, weight = name.rpartition(".")
        layer = self.model.get_submodule(path)
        return layer if isinstance(layer, QuantModule) and weight in layer.weights() else None

    def pieces(self) -> list[Work]:
        if not self.quantizes():
            return [self]
        return [replace(self, group=piece) for piece in self.group.pieces()]

    def cost(self, folder: Folder, outputs: Mapping[str, Tensor], pieces: int) -> int:
        cost = super().cost(folder, outputs, pieces)
        if self.quantizes():  # the result, and that decoded again for its error
            cost += sum(tensor.nbytes for tensor in outputs.values()) // pieces
            cost += cast_bytes(folder, self.group)
        return cost

    def stored(
        self, name: str, value: Tensor, squares: dict[str, tuple[float, float]] | None
    ) -> dict[str, Tensor]:
        path, _, weight = name.rpartition(".")
        layer = self._layer(name)
        if layer is None:
            return {name: value}
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
        return {f"{path}.{key}": tensor for key, tensor in stored.items()}


def _empty(layer: QuantModule, weight: str) -> QuantizedTensor:
    """A quantized weight of `layer` on the meta device."""
    shape, dtype = layer.weights()[weight]
    format = layer.scheme.weight
    parts = [torch.empty(part.shape, dtype=DTYPES[part.dtype], device="meta") for part in format.parts(shape)]
    return QuantizedTensor.from_parts(parts, format, shape, dtype)


def _report(model: Any) -> Report:
    """The report of the result, where layers do not wait for weights any more."""
    casts = Casts(model)
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

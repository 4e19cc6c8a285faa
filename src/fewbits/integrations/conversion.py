"""What transformers' loader does with single tensors: quantize them, or read bitsandbytes files."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from fewbits import machine
from fewbits import model as placing
from fewbits.checkpoint import bitsandbytes as schema
from fewbits.experts import QuantExperts
from fewbits.nn import QuantLinear, QuantModule

_WORTH_FORGETTING = 2**20
"""Bytes of a weight whose pages are given back when it is quantized."""


class Conversion(ConversionOps):
    """Converts until the first failure, which it hands to the quantizer.

    The loader would log errors one by one and end with one that names no weight. The quantizer raises the
    first when loading ends; what is left by then is passed over.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        missing = set() if missing_keys is None else missing_keys
        try:
            if self.hf_quantizer.failure is None:
                tensors = {key: _single(value) for key, value in input_dict.items()}
                return self.run(tensors, full_layer_name, model, missing)
        except (ValueError, RuntimeError) as error:
            self.hf_quantizer.failure = error
        # Known to be missing: worth no line each in the report, and no random values.
        path = full_layer_name.rpartition(".")[0]
        missing -= {key for key in missing if key.startswith(f"{path}.")}
        for tensor in model.get_submodule(path).state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        return {}

    @abstractmethod
    def run(
        self, tensors: dict[str, Tensor], name: str, model: nn.Module, missing: set[str]
    ) -> dict[str, Tensor]:
        """Full name → tensor for the model; `name` is what the loader calls the weight."""

    @property
    def reverse_op(self) -> ConversionOps:
        return Pass()


class QuantizeWeight(Conversion):
    """A full-precision weight that streams in → the parts of its layer. Other tensors pass."""

    def run(
        self, tensors: dict[str, Tensor], name: str, model: nn.Module, missing: set[str]
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for full_name, tensor in tensors.items():
            path, _, weight = full_name.rpartition(".")
            layer = model.get_submodule(path)
            if not isinstance(layer, QuantModule) or weight not in layer.weights():
                result[full_name] = tensor
                continue
            result |= _parameters(layer, path, placing.fill(layer, weight, tensor, full_name))
            self.hf_quantizer.count(tensor.nbytes)
            if tensor.is_cpu and tensor.is_contiguous() and tensor.nbytes >= _WORTH_FORGETTING:
                machine.forget_file_pages(tensor.data_ptr(), tensor.nbytes)
            if isinstance(layer, QuantExperts):  # the fused weight itself is not part of the model any more
                layer._parameters.pop(weight, None)
                missing.discard(full_name)
        return result


class ReadBitsAndBytes(Conversion):
    """The tensors of one layer of a bitsandbytes file → the parts of our layer; plain weights are cast."""

    # The loader casts nothing that an op with a `hf_quantizer` reads; this is what a plain weight becomes.
    dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> ReadBitsAndBytes:
        return ReadBitsAndBytes(self.hf_quantizer)  # the loader copies an op per weight

    def run(
        self, tensors: dict[str, Tensor], name: str, model: nn.Module, missing: set[str]
    ) -> dict[str, Tensor]:
        path = name.rpartition(".")[0]
        layer = model.get_submodule(path)
        if set(tensors) == {"weight"} and not isinstance(layer, QuantLinear):
            weight = tensors["weight"]
            return {name: weight.to(self.dtype) if weight.is_floating_point() else weight}
        quantized = schema.from_file(tensors, path)
        if not isinstance(layer, QuantLinear) or quantized.shape != layer.weights()["weight"][0]:
            raise ValueError(
                f"{path} is stored as {quantized.format} {list(quantized.shape)}, but the model has "
                f"{layer} there; the checkpoint belongs to another architecture"
            )
        # The file knows best what it holds: block size, storage dtype, the dtype before quantization.
        storage = str(tensors["weight"].dtype).removeprefix("torch.")
        layer.adopt(quantized, "uint8" if quantized.format.family == "int8" else storage)
        return _parameters(layer, path, layer.stored("weight", [quantized]))


class Pass(ConversionOps):
    """Nothing to do."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def bitsandbytes_reader(quantizer: Any) -> WeightConverter:
    """Collects all tensors of a layer in a bitsandbytes file, by the names behind that of the layer."""
    # Longest first: `weight` begins most of them, and the first that matches is taken.
    names = sorted(schema.KEYS, key=len, reverse=True)
    return WeightConverter(names, "weight", [ReadBitsAndBytes(quantizer)])


def drop_readers(model: Any) -> None:
    """Forget the readers, so that saving, which knows the schema itself, does not revert them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(isinstance(op, ReadBitsAndBytes) for op in getattr(conversion, "operations", ()))
        ]


def keep_codes_together(model: Any) -> None:
    """Forget the conversions that saving would revert on codes, fusing those of q, k and v for instance.

    Quantized layers are saved under the names of the model, which the loader knows as well.
    """
    parts = [
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantModule)
        for weight in layer.weights()
        for part in layer.part_names(weight).values()
    ]
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [one for one in conversions if not _would_revert(one, parts)]


def _would_revert(conversion: Any, names: list[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names)


def _single(value: Any) -> Tensor:
    """Tensors come alone or in lists of one."""
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _parameters(layer: QuantModule, path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full name → frozen parameter, or plain tensor where the layer has a buffer."""
    prefix = f"{path}." if path else ""
    return {
        f"{prefix}{name}": tensor if name in layer._buffers else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in tensors.items()
    }

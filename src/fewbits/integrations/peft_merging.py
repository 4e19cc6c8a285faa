"""PEFT layers over quantized ones that merge: PEFT's own methods, on decoded weights, rounded once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from fewbits import ops
from fewbits.integrations.peft_experts import warn_of_rounding
from fewbits.nn import QuantEmbedding, QuantLinear, QuantMatrix
from fewbits.tensor import QuantizedTensor


class Backend(QuantizationBackend):
    """How PEFT reads the weight of a quantized layer. While merging, a plain one is in its place."""

    supports_merge = True
    backend_name = "fewbits"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """W [out, in]; of a quantized layer in float32."""
        if isinstance(base_layer, QuantLinear):
            return base_layer.quantized_weight().dequantize(torch.float32)
        return base_layer.get_parameter("weight").data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().get_parameter("weight").data = weight_data


@dataclass(frozen=True)
class _Before:
    """A layer as it was before anything was merged into it."""

    weight: QuantizedTensor
    bias: Tensor | None
    note: str | None
    relative_error: float | None

    @staticmethod
    def of(layer: QuantMatrix) -> _Before:
        parts = {name: part.detach().clone() for name, part in layer.quantized_weight().parts().items()}
        weight = QuantizedTensor.from_parts(parts, layer.scheme.weight, layer.weights()["weight"][0])
        bias, errors = _bias(layer), layer.relative_errors
        return _Before(
            weight,
            None if bias is None else bias.detach().clone(),
            layer.notes.get("weight"),
            errors.get("weight"),
        )

    def restore(self, layer: QuantMatrix) -> None:
        layer.overwrite(self.weight)
        _set_bias(layer, self.bias)
        _put(layer.notes, self.note)
        _put(layer.relative_errors, self.relative_error)


class Merging:
    """Merging for any PEFT layer over a quantized one.

    PEFT's own methods run on a plain layer with the decoded weight; what they leave there is quantized once.
    So whatever merges into plain layers merges here. The codes of before are kept while anything is merged,
    so that unmerging is exact, and merging a second adapter does not round the first one twice. Where another
    layer has changed the codes since (tied layers, mixed adapters), both go on from what is there, as PEFT
    does.
    """

    base_layer: Any
    merged_adapters: list[str]
    _before: _Before | None = None
    _left: bytes = b""  # digest of the codes that merging left

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (None: the active ones) to the weight, and round it to its Format again.

        With `safe_merge`, ValueError and no change for weights that are not finite; without, too: codes
        cannot hold them. `report` tells the error added.
        """
        me, parent = _both(self)
        layer = me.get_base_layer()
        if not isinstance(layer, QuantMatrix):  # dequantized since
            parent.merge(safe_merge, adapter_names)
            return
        names = check_adapters_to_merge(me, adapter_names)
        if not names:
            return
        merged, bias = self.merged_adapters, _bias(layer)
        now = None if bias is None else bias.detach().clone()
        whole = not merged or self._is_own(layer)
        before = (self._before if merged and whole else None) or _Before.of(layer)
        start = before.weight.to(layer.quantized_weight().device).dequantize(torch.float32)
        self.merged_adapters = [] if whole else list(merged)
        try:
            if whole:
                _set_bias(layer, before.bias)
            with self._decoded(start.clone()) as plain:
                parent.merge(safe_merge, [*merged, *names] if whole else names)
            if self.merged_adapters != merged:
                merge_into(layer, plain.weight, start, ", ".join(self.merged_adapters))
                self._before, self._left = (before, _digest(layer)) if whole else (None, b"")
        except BaseException:
            self.merged_adapters = merged
            _set_bias(layer, now)
            raise

    def unmerge(self) -> None:
        """Give the codes of before the first merge back, bit for bit; without the adapters, if others changed
        them."""
        me, parent = _both(self)
        layer = me.get_base_layer()
        if not isinstance(layer, QuantMatrix) or not self.merged_adapters:
            parent.unmerge()
        elif self._before is not None and self._is_own(layer):
            self._before.restore(layer)
            self.merged_adapters.clear()
        else:
            with self._decoded(layer.quantized_weight().dequantize(torch.float32)) as plain:
                parent.unmerge()
            requantize(layer, plain.weight, "unmerged and rounded again")
        self._before, self._left = None, b""

    def _is_own(self, layer: QuantMatrix) -> bool:
        """Whether the codes are still those that this layer merged into them."""
        return self._left == _digest(layer)

    @contextmanager
    def _decoded(self, weight: Tensor) -> Iterator[Any]:
        """A plain layer with `weight` and the bias of the quantized layer, in its place for a while."""
        holder: Any = self
        while isinstance(holder.base_layer, BaseTunerLayer):
            holder = holder.base_layer
        layer = holder.base_layer
        sizes = tuple(weight.shape) if isinstance(layer, QuantEmbedding) else tuple(weight.shape[::-1])
        kind: Any = nn.Embedding if isinstance(layer, QuantEmbedding) else nn.Linear
        plain = kind(*sizes, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(layer, QuantLinear):
            plain.bias = layer.bias
        holder.base_layer = plain
        try:
            yield plain
        finally:
            holder.base_layer = layer


class _OverQuantized(Merging):
    """What LoRA layers share: they merge, and initialisations may change the weight (PiSSA, OLoRA, …)."""

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter. What an initialisation by name takes out of the weight, the codes lose."""
        parent: Any = super()
        if not isinstance(config.init_lora_weights, str):
            parent.update_layer(adapter_name, *args, config=config, **kwargs)
            return
        if config.init_lora_weights == "loftq":
            raise ValueError(
                "init_lora_weights='loftq' needs the weights before quantization. Leave it out, and call "
                "fewbits.integrations.peft.initialize_loftq(model, originals) after get_peft_model"
            )
        me: Any = self
        layer = me.get_base_layer()
        check_here(layer)
        before = layer.quantized_weight().dequantize(torch.float32)
        with self._decoded(before.clone()) as plain:
            parent.update_layer(adapter_name, *args, config=config, **kwargs)
        if not torch.equal(plain.weight, before):
            requantize(layer, plain.weight, f"changed by {config.init_lora_weights}")
        me._move_adapter_to_device_of_base_layer(adapter_name)


class LoraLinear(_OverQuantized, lora.Linear):
    """LoRA over a `QuantLinear`."""


class LoraEmbedding(_OverQuantized, lora.Embedding):
    """LoRA over a `QuantEmbedding`."""


def needs_merging(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT over a quantized one that cannot merge yet."""
    return (
        isinstance(module, BaseTunerLayer)
        and not isinstance(module, Merging)
        and isinstance(module.get_base_layer(), QuantMatrix)
    )


@functools.cache
def merging_class(layer: Any) -> type[nn.Module]:
    return type(layer.__name__, (Merging, layer), {"__module__": layer.__module__, "__reduce_ex__": _reduce})


def _reduce(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle knows classes by name; these are made here."""
    return _again, (type(layer).__mro__[2],), layer.__getstate__()


def _again(kind: Any) -> nn.Module:
    made: nn.Module = object.__new__(merging_class(kind))
    return made


def merge_into(layer: QuantMatrix, merged: Tensor, before: Tensor, names: str) -> None:
    """Round `merged` to the Format of `layer`; note the error, of the weight and of what was added to it."""
    change = float((merged.float() - before).norm())
    error = requantize(layer, merged, "")
    added = f", {error / change:.3g} of the change" if change else ""
    layer.notes["weight"] = f"merged {names}: {layer.relative_errors['weight']:.4f} of the weight{added} lost"
    warn_of_rounding()


def requantize(layer: QuantMatrix, value: Tensor, note: str) -> float:
    """Store the nearest codes of `value` [out, in] in `layer`, in place; returns ‖value - decode(codes)‖."""
    exact = value.detach().float()
    quantized = ops.quantize(exact, layer.scheme.weight, name="the changed weight")
    error = float((exact - quantized.dequantize(torch.float32)).norm())
    layer.overwrite(quantized)
    layer.relative_errors["weight"] = error / (float(exact.norm()) or 1.0)
    layer.notes["weight"] = note
    return error


def check_here(layer: QuantMatrix) -> None:
    if layer.quantized_weight().device.type == "meta":
        raise ValueError(
            f"the weight of {layer} is offloaded, and cannot be changed; add adapters before the model is "
            "offloaded, or take init_lora_weights=True"
        )


def _both(layer: Any) -> tuple[Any, Any]:
    return layer, super(Merging, layer)


def _digest(layer: QuantMatrix) -> bytes:
    """What tells whether codes and scales are the same as before."""
    found = hashlib.blake2b(digest_size=16)
    for part in layer.quantized_weight().parts().values():
        found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()


def _put(known: dict[str, Any], value: Any) -> None:
    known.pop("weight", None)
    if value is not None:
        known["weight"] = value


def _bias(layer: QuantMatrix) -> Tensor | None:
    return layer.bias if isinstance(layer, QuantLinear) else None


def _set_bias(layer: QuantMatrix, value: Tensor | None) -> None:
    bias = _bias(layer)
    if bias is not None and value is not None:
        bias.data.copy_(value)

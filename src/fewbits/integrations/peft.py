"""fewbits under PEFT: adapters over quantized layers that merge, and preparation for training.

PEFT knows quantized layers by their package. `integrations.__init__` puts the first five functions here in
front of PEFT's own of the same name; each takes the original first and passes on what is not ours.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from fewbits import ops, training
from fewbits.algorithms.loftq import loftq
from fewbits.checkpoint.folder import open_folder
from fewbits.experts import QuantExperts
from fewbits.integrations.peft_experts import ParamWrapper
from fewbits.nn import QuantEmbedding, QuantLinear, QuantMatrix, QuantModule
from fewbits.tensor import QuantizedTensor

_COMPUTE_WITH_WEIGHTS = ("hra", "loha", "lokr")
"""Methods of PEFT that read the weight in every forward, and have no backend for quantized ones."""


# --- what PEFT calls --------------------------------------------------------------------------------


def prepare_model_for_kbit_training(
    original: Any,
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """PEFT's protocol: all frozen, what is not quantized in float32, activations recomputed.

    Codes and scales stay as they are, whatever dtype holds them; `fewbits.report` notes what was cast.
    """
    if not any(isinstance(module, QuantModule) for module in model.modules()):
        return original(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache)
    training.prepare(model, lambda module: True, "prepare_model_for_kbit_training")
    if use_gradient_checkpointing:
        training.checkpoint_activations(model, gradient_checkpointing_kwargs)
    return model


def dispatch_default(
    original: Any,
    target: nn.Module,
    adapter_name: str,
    config: Any,
    parameter_name: str | None = None,
    **kwargs: Any,
) -> nn.Module | None:
    """The LoRA layer for `target`: one that can merge, if what it adapts is a quantized layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is None and isinstance(base, QuantLinear):
        if config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out=True, but quantized layers hold weights as [out, in]; set to False",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
        return LoraLinear(target, adapter_name, config=config, **kwargs)
    if parameter_name is not None and isinstance(base, QuantExperts):
        return ParamWrapper(target, adapter_name, parameter_name, config, **kwargs)
    if parameter_name is None and isinstance(base, QuantEmbedding):
        return LoraEmbedding(target, adapter_name, config=config, **kwargs)
    made: nn.Module | None = original(target, adapter_name, config, parameter_name=parameter_name, **kwargs)
    return made


def inject_adapter(original: Any, tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Put the layers of an adapter into `model`, so that those over quantized layers can merge.

    PEFT finds what `target_parameters` names by the names of parameters. The weights of quantized experts
    have no parameter of their name; for this call they get one without data.
    """
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    for layer in experts:
        for weight, (shape, dtype) in layer.weights().items():
            stand_in = torch.empty((layer.count, *shape), dtype=dtype, device="meta")
            layer.register_parameter(weight, nn.Parameter(stand_in, requires_grad=False))
    try:
        return original(tuner, model, *args, **kwargs)
    finally:
        for layer in experts:
            for weight in layer.weights():
                del layer._parameters[weight]
        for module in list(model.modules()):
            if _is_unknown(module):
                kind: Any = type(module)
                module.__class__ = _merging(kind)


def dequantize_module_weight(original: Any, module: nn.Module) -> Tensor:
    """The weight of a layer in floating point, for DoRA."""
    weight: Tensor = module.dequantize() if isinstance(module, QuantMatrix) else original(module)
    return weight


def resolve_quantization_backend(
    original: Any, base_layer: nn.Module, **kwargs: Any
) -> QuantizationBackend | None:
    """How VeRA, MiSS, OFT, BOFT and SHiRA read and write the weight of a layer."""
    return Backend() if isinstance(base_layer, QuantLinear) else original(base_layer, **kwargs)


# --- merging ----------------------------------------------------------------------------------------


class Backend(QuantizationBackend):
    """Reads and writes a quantized weight for one PEFT layer; unmerging all gives the first codes back."""

    supports_merge = True
    backend_name = "fewbits"
    layer_type = "linear"

    def __init__(self) -> None:
        self._first: QuantizedTensor | None = None  # before anything was merged

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """W [out, in] in float32."""
        assert isinstance(base_layer, QuantLinear)
        return base_layer.quantized_weight().dequantize(torch.float32)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        layer = peft_layer.get_base_layer()
        # PEFT names an adapter as merged after it merges, and as not merged before it unmerges.
        if self._first is not None and not peft_layer.merged_adapters:
            layer.overwrite(self._first)
            layer.notes.pop("weight", None)
            self._first = None
            return
        self._first = self._first or _copy(layer.quantized_weight())
        merge_into(layer, weight_data, self._first, "adapter")


class _Merging:
    """Merging for any PEFT layer over a quantized one.

    PEFT's own methods run on a plain layer with the decoded weight; what they leave there is quantized once.
    So whatever merges into plain layers merges here. The codes of before are kept while anything is merged,
    so that unmerging is exact, and merging a second adapter does not round the first one twice.
    """

    base_layer: Any
    merged_adapters: list[str]
    _first: tuple[QuantizedTensor, Tensor | None] | None = None  # weight and bias before merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (None: the active ones) to the weight, and round it to its Format again.

        With `safe_merge`, ValueError and no change for weights that are not finite; without, too: codes
        cannot hold them. `report` tells the error added.
        """
        me, parent = _both(self)
        names = check_adapters_to_merge(me, adapter_names)
        if not names:
            return
        layer, merged = me.get_base_layer(), self.merged_adapters
        bias = getattr(layer, "bias", None)
        now = None if bias is None else bias.detach().clone()
        first = self._first or (_copy(layer.quantized_weight()), now)
        self.merged_adapters = []
        try:
            _restore_bias(layer, first[1])
            with self._decoded(first[0].dequantize(torch.float32)) as plain:
                parent.merge(safe_merge, [*merged, *names])
            if self.merged_adapters:
                merge_into(layer, plain.weight, first[0], ", ".join(self.merged_adapters))
                self._first = first
        except BaseException:
            self.merged_adapters = merged
            _restore_bias(layer, now)
            raise

    def unmerge(self) -> None:
        """Give the codes of before the first merge back, bit for bit."""
        me, parent = _both(self)
        if self._first is None:
            parent.unmerge()  # says that nothing is merged
            return
        layer = me.get_base_layer()
        layer.overwrite(self._first[0])
        _restore_bias(layer, self._first[1])
        layer.notes.pop("weight", None)
        self.merged_adapters.clear()
        self._first = None

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


class _OverQuantized(_Merging):
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


def _is_unknown(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT over a quantized one that neither we nor a backend taught to merge.

    ValueError for one that cannot work: it computes with the weight, and would take the codes for it.
    """
    unknown = (
        isinstance(module, BaseTunerLayer)
        and not isinstance(module, _Merging)
        and module.quantization_backend is None
        and isinstance(module.get_base_layer(), QuantMatrix)
    )
    method = type(module).__module__.split(".")[2] if unknown else ""
    if method in _COMPUTE_WITH_WEIGHTS:
        raise ValueError(
            f"PEFT's {method} computes with the weights it adapts, and does not know quantized ones. "
            "Take LoRA, VeRA, MiSS or OFT, or a model that is not quantized"
        )
    return unknown


@functools.cache
def _merging(layer: Any) -> type[nn.Module]:
    return type(layer.__name__, (_Merging, layer), {"__module__": layer.__module__})


def merge_into(layer: QuantMatrix, merged: Tensor, first: QuantizedTensor, names: str) -> None:
    """Round `merged` to the Format of `layer`; note the error, of the weight and of what was added to it."""
    change = float((merged.float() - first.dequantize(torch.float32)).norm())
    error = requantize(layer, merged, "")
    added = f", {error / change:.3g} of the change" if change else ""
    layer.notes["weight"] = f"merged {names}: {layer.relative_errors['weight']:.4f} of the weight{added} lost"
    warnings.warn(
        "merging into quantized weights rounds them again; fewbits.report(model) tells what each layer lost. "
        "To lose nothing, merge into 16-bit weights: fewbits merge",
        stacklevel=3,
    )


def requantize(layer: QuantMatrix, value: Tensor, note: str) -> float:
    """Store the nearest codes of `value` [out, in] in `layer`, in place; returns ‖value - decode(codes)‖."""
    exact = value.detach().float()
    quantized = ops.quantize(exact, layer.scheme.weight, name="the changed weight")
    error = float((exact - quantized.dequantize(torch.float32)).norm())
    layer.overwrite(quantized)
    layer.relative_errors["weight"] = error / (float(exact.norm()) or 1.0)
    layer.notes["weight"] = note
    return error


def _both(layer: Any) -> tuple[Any, Any]:
    return layer, super(_Merging, layer)


def _copy(weight: QuantizedTensor) -> QuantizedTensor:
    parts = {name: part.detach().clone() for name, part in weight.parts().items()}
    return QuantizedTensor.from_parts(parts, weight.format, weight.shape, weight.dtype)


def _restore_bias(layer: QuantMatrix, bias: Tensor | None) -> None:
    if bias is not None and isinstance(layer, QuantLinear):
        layer.bias.data.copy_(bias)


# --- LoftQ ------------------------------------------------------------------------------------------


def initialize_loftq(
    model: Any,
    originals: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    iterations: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Choose codes and adapter of every LoRA layer over a quantized one together: LoftQ.

    model       a PeftModel over a quantized model; codes, and A and B of `adapter_name`, change in place
    originals   the weights before quantization: the folder of the checkpoint, a model, or its state dict;
                of a folder, one weight at a time is read
    iterations  of `algorithms.loftq.loftq`

    Returns the relative errors that `loftq` gives, by the name of the layer. The adapter belongs to these
    codes: save both, `model.get_base_model().save_pretrained(…)` and `model.save_pretrained(…)`. ValueError
    where no such layer is, an original is missing or has another shape, DoRA is used, or an adapter is
    merged.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(f"no LoRA layer over a quantized one has an adapter {adapter_name!r}")
    read = _reader(originals)
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    prefix = f"{getattr(model.get_base_model(), 'base_model_prefix', '')}."
    errors = {}
    for name, module in layers.items():
        if module.merged or adapter_name in module.lora_variant:
            raise ValueError(f"{name}: LoftQ takes plain LoRA layers that are not merged; unmerge, no DoRA")
        path = names[id(module)]
        weight = _first_found(
            read, [f"{one}.weight" for one in (path, path.removeprefix(prefix), prefix + path)]
        )
        errors[path] = _start_from(module, adapter_name, weight, iterations, path)
    return errors


def _start_from(
    module: Any, adapter_name: str, weight: Tensor, iterations: int, name: str
) -> tuple[float, ...]:
    layer = module.get_base_layer()
    (exact,) = layer.matrices(weight)
    shape = layer.weights()["weight"][0]
    if exact.shape != shape:
        raise ValueError(
            f"{name}: the original is {list(exact.shape)}, the layer {list(shape)}; not its weight"
        )
    a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
    found = loftq(exact.to(a.device), layer.scheme.weight, a.shape[0], iterations=iterations, name=name)
    layer.overwrite(found.quantized)
    layer.relative_errors["weight"] = found.relative_errors[0]
    layer.notes["weight"] = f"LoftQ: {found.relative_errors[-1]:.4f} with adapter {adapter_name}"
    with torch.no_grad():
        a.copy_(found.a)
        b.copy_(found.b / module.scaling[adapter_name])
    return found.relative_errors


def _reader(originals: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """name → tensor; KeyError for a name that is not there."""
    if isinstance(originals, nn.Module):
        originals = originals.state_dict(keep_vars=True)
    if isinstance(originals, Mapping):
        return originals.__getitem__
    folder = open_folder(Path(originals))
    return folder.read


def _first_found(read: Callable[[str], Tensor], names: Sequence[str]) -> Tensor:
    for name in names:
        try:
            return read(name)
        except KeyError:
            continue
    raise ValueError(
        f"the originals have no {' or '.join(dict.fromkeys(names))}; give the weights of this model"
    )

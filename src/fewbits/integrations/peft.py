"""fewbits under PEFT: adapters over quantized layers that merge, and preparation for training.

PEFT knows quantized layers by their package. `integrations.__init__` puts the first five functions here in
front of PEFT's own of the same name; each takes the original first and passes on what is not ours.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from fewbits import training
from fewbits.algorithms.loftq import loftq
from fewbits.checkpoint.folder import open_folder
from fewbits.experts import QuantExperts
from fewbits.int8_training import TrainableInt8Linear
from fewbits.integrations.peft_experts import ParamWrapper
from fewbits.integrations.peft_merging import (
    Backend,
    LoraEmbedding,
    LoraLinear,
    check_here,
    merging_class,
    needs_merging,
)
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantEmbedding, QuantLinear, QuantMatrix, QuantModule, is_transposed

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
    if not any(isinstance(module, QuantModule | TrainableInt8Linear) for module in model.modules()):
        return original(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache)
    training.prepare(model, lambda module: True, "prepare_model_for_kbit_training")
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), FewbitsQuantizer):
        quantizer.end_casts()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
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
    if parameter_name is None and isinstance(base, TrainableInt8Linear):
        # PEFT would take every nn.Linear to hold [out, in].
        config.fan_in_fan_out = is_transposed(base.source_class)
        plain: nn.Module = lora.Linear(target, adapter_name, config=config, **kwargs)
        return plain
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
    have no parameter of their name; for this call they get one without data. ValueError, before anything is
    changed, for what would train nothing or compute with codes.
    """
    _check_adapter(tuner, tuner.peft_config[args[0] if args else kwargs["adapter_name"]], model)
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
            if needs_merging(module):
                kind: Any = type(module)
                module.__class__ = merging_class(kind)


def _check_adapter(tuner: Any, config: Any, model: nn.Module) -> None:
    """ValueError for an adapter that quantized layers cannot have, naming the first of them."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantModule)]
    method = config.peft_type.value.lower()
    if method in _COMPUTE_WITH_WEIGHTS:
        everywhere = config.target_modules in (None, "all-linear")
        for name, layer in layers:
            if isinstance(layer, QuantLinear) and (
                everywhere or tuner._check_target_module_exists(config, name)
            ):
                raise ValueError(
                    f"PEFT's {method} computes with the weights it adapts, and {name} is quantized. "
                    "Take LoRA, VeRA, MiSS or OFT, or a model that is not quantized"
                )
    whole = tuple(getattr(config, "modules_to_save", None) or ())
    tokens = getattr(config, "trainable_token_indices", None) or ()
    whole += tuple(tokens) if isinstance(tokens, Mapping) else ("embed_tokens",) if tokens else ()
    for name, _ in layers:
        if any(name == one or name.endswith(f".{one}") for one in whole):
            raise ValueError(
                f"{name} is quantized, and its codes cannot be trained, as modules_to_save or "
                "trainable_token_indices ask. Skip this layer in the quantization config, or give it LoRA"
            )


def dequantize_module_weight(original: Any, module: nn.Module) -> Tensor:
    """The weight of a layer in floating point, for DoRA."""
    weight: Tensor = module.dequantize() if isinstance(module, QuantMatrix) else original(module)
    return weight


def resolve_quantization_backend(
    original: Any, base_layer: nn.Module, **kwargs: Any
) -> QuantizationBackend | None:
    """How VeRA, MiSS, OFT, BOFT and SHiRA read and write the weight of a layer."""
    return Backend() if isinstance(base_layer, QuantLinear) else original(base_layer, **kwargs)


# --- LoftQ ------------------------------------------------------------------------------------------


def initialize_loftq(
    model: Any,
    originals: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    iterations: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Choose codes and adapter of every LoRA layer over a quantized linear one together: LoftQ.

    model       a PeftModel over a quantized model; codes, and A and B of `adapter_name`, change in place
    originals   the weights before quantization: the folder of the checkpoint, a model, or its state dict;
                of a folder, one weight at a time is read
    iterations  of `algorithms.loftq.loftq`

    Returns the relative errors that `loftq` gives, by the name of the layer. The adapter belongs to these
    codes: save both, `model.save_pretrained(…)` and then `model.unload().save_pretrained(…)`. ValueError,
    before anything is changed, where no such layer is, an original is missing or has another shape, DoRA is
    used, an adapter is merged, or weights are offloaded.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(f"no LoRA layer over a quantized one has an adapter {adapter_name!r}")
    find = _finder(originals)
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    prefix = f"{getattr(model.get_base_model(), 'base_model_prefix', '')}."
    chosen = []
    for name, module in layers.items():
        check_here(module.get_base_layer())
        if module.merged or adapter_name in module.lora_variant:
            raise ValueError(f"{name}: LoftQ takes plain LoRA layers that are not merged; unmerge, no DoRA")
        path = names[id(module)]
        places = dict.fromkeys((path, path.removeprefix(prefix), prefix + path))
        chosen.append((path, module, find([f"{one}.weight" for one in places], module.get_base_layer())))
    return {
        path: _start_from(module, adapter_name, read(), iterations, path) for path, module, read in chosen
    }


def _start_from(
    module: Any, adapter_name: str, weight: Tensor, iterations: int, name: str
) -> tuple[float, ...]:
    layer = module.get_base_layer()
    (exact,) = layer.matrices(weight)
    a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
    exact = exact.to(a.device)
    found = loftq(exact, layer.scheme.weight, a.shape[0], iterations=iterations, name=name)
    layer.overwrite(found.quantized)
    lost = exact.float() - found.quantized.dequantize(torch.float32)
    layer.relative_errors["weight"] = float(lost.norm()) / (float(exact.float().norm()) or 1.0)
    layer.notes["weight"] = f"LoftQ: {min(found.relative_errors[1:]):.4f} with adapter {adapter_name}"
    with torch.no_grad():
        a.copy_(found.a)
        b.copy_(found.b / module.scaling[adapter_name])
    return found.relative_errors


def _finder(
    originals: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor],
) -> Callable[[Sequence[str], QuantLinear], Callable[[], Tensor]]:
    """(names of a weight, its layer) → what reads it; ValueError if none is there, or of another shape."""
    if isinstance(originals, nn.Module):
        originals = originals.state_dict(keep_vars=True)
    folder = None if isinstance(originals, Mapping) else open_folder(Path(originals))
    tensors: Mapping[str, Tensor] = originals if isinstance(originals, Mapping) else {}

    def find(names: Sequence[str], layer: QuantLinear) -> Callable[[], Tensor]:
        known = tensors if folder is None else folder.files
        name = next((one for one in names if one in known), None)
        if name is None:
            raise ValueError(f"the originals have no {' or '.join(names)}; give the weights of this model")
        shape = tuple(tensors[name].shape if folder is None else folder.info(name).shape)
        wanted = tuple(layer.weights()["weight"][0])
        if (shape[::-1] if is_transposed(layer.source_class) else shape) != wanted:
            raise ValueError(
                f"{name}: the original is {list(shape)}, the layer {list(wanted)}; not its weight"
            )
        return functools.partial(tensors.__getitem__ if folder is None else folder.read, name)

    return find

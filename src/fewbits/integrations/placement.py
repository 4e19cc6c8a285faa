"""Modules that a device map puts on the CPU or the disk: where they are computed, and which stay in float32.

accelerate offloads what lies on the disk, and what lies on the CPU beside an accelerator: it copies such
weights to the accelerator in every forward. Here what lies on the CPU is computed there instead, in its
quantized form. With `llm_int8_enable_fp32_cpu_offload`, what would be offloaded stays in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fewbits.model import tied_modules
from fewbits.nn import QuantModule
from fewbits.report import KEPT_REASONS

FLAG = "llm_int8_enable_fp32_cpu_offload"
DeviceMap = Mapping[str, Any]
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def offloaded(device_map: DeviceMap) -> dict[str, str]:
    """Entries of a device map that accelerate offloads: on the disk, and on the CPU beside an accelerator."""
    places = {name: str(place) for name, place in device_map.items()}
    away = {"disk"} if set(places.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    return {name: place for name, place in places.items() if place in away}


def check_disk(device_map: DeviceMap, quantizes: bool, mixes_dtypes: bool) -> None:
    """ValueError for a device map with layers on the disk that would not come back as they should.

    `quantizes`: whether they would be quantized while loading. `mixes_dtypes`: whether they hold more than
    one floating dtype.
    """
    from transformers.integrations.accelerate import accelerate_disk_offload

    away = [name for name, place in device_map.items() if place == "disk"]
    if away and quantizes:
        shown = ", ".join(away[:3]) + (", …" if len(away) > 3 else "")
        raise ValueError(
            f"the device map puts layers on the disk ({shown}), but quantizing while loading would leave "
            "their unquantized weights there. Quantize once with device_map='cpu' and save_pretrained, then "
            "load that folder with this device map"
        )
    # An early transformers 5 did.
    casts = "dtype" in inspect.signature(accelerate_disk_offload).parameters
    if away and mixes_dtypes and casts:
        raise ValueError(
            "this transformers casts what it keeps on the disk to the dtype of the model, which would change "
            "scales and what is in float32; upgrade transformers, or use a device map without 'disk'"
        )


def share_scales(model: nn.Module) -> None:
    """Give layers that are tied to another its scales; transformers ties the codes."""
    from accelerate.utils import align_module_device

    for target, source in tied_modules(model):
        one, other = model.get_submodule(target), model.get_submodule(source)
        if isinstance(one, QuantModule) and isinstance(other, QuantModule):
            with align_module_device(other):  # scales that are offloaded come in, and stay for `one`
                for name in set(one.part_names("weight").values()) & set(one._buffers):
                    setattr(one, name, getattr(other, name))


def keep_on_cpu(model: nn.Module) -> None:
    """Compute what the device map of a dispatched model puts on the CPU on the CPU, also beside accelerators.

    The rest stays with accelerate, the disk included.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    device_map: DeviceMap = getattr(model, "hf_device_map", {})
    away = {name for name, place in offloaded(device_map).items() if place == "cpu"}
    inside = {name for name, _ in model.named_modules() if name and _entry(device_map, name) in away}
    for name in inside:
        remove_hook_from_module(model.get_submodule(name))._apply(lambda one: one.to("cpu"), recurse=False)
    skipped: Any = getattr(model, "_skip_keys_device_placement", None)
    for name, module in _borders(model, inside):
        if name in inside:
            hook = AlignDevicesHook(execution_device="cpu", io_same_device=True, skip_keys=skipped)
            add_hook_to_module(module, hook)


class Float32Offload:
    """Modules of a model, not loaded yet, that stay in float32 because a device map offloads them.

    Where one of them meets the rest of the model, what enters it is cast to float32, and what leaves it to
    the dtype of the model; so all of it is computed in float32. A module that is tied to an offloaded one is
    in float32, too. Layers that a checkpoint holds quantized stay so: they have no other weights.
    """

    def __init__(self, model: Any, originals: Mapping[str, nn.Module]) -> None:
        """`originals`: the layers, by name, that quantized ones have replaced for now."""
        self.model, self.originals = model, originals
        self.dtype: torch.dtype = model.dtype
        self.reasons: dict[str, str] = {}  # module → why it is in float32

    def extend(self, device_map: DeviceMap) -> bool:
        """Bring all that `device_map` offloads to float32; whether that changed any module."""
        away = offloaded(device_map)
        places = {name: away.get(_entry(device_map, name)) for name, _ in self.model.named_modules()}
        for one, other in tied_modules(self.model):
            if one in places and other in places:
                places[one] = places[other] = places[one] or places[other]
        reasons = {name: f"float32 on the {place}, with {FLAG}" for name, place in places.items() if place}
        new = reasons.keys() - self.reasons.keys()
        for name in new:
            if name in self.originals:
                self.model.set_submodule(name, self.originals[name])
            module = self.model.get_submodule(name)
            if not isinstance(module, QuantModule):
                _cast_module(module, torch.float32)
        self.reasons |= reasons
        return bool(new)

    def settle(self, device_map: dict[str, Any], max_memory: Mapping[Any, Any], quantizer: Any) -> None:
        """The same for a map that was inferred, for `max_memory`, with the sizes of quantized layers.

        What it offloads takes more in float32, so it is inferred again, in place, until it offloads no more.
        """
        from transformers.integrations.accelerate import infer_auto_device_map

        while self.extend(device_map):
            again = infer_auto_device_map(
                self.model,
                max_memory=dict(max_memory),
                no_split_module_classes=self.model._no_split_modules,
                hf_quantizer=quantizer,
            )
            device_map.clear()
            device_map.update(again)

    def finish(self) -> list[RemovableHandle]:
        """Cast at the borders, by the hooks that are returned, and note the reasons for the report."""
        noted: dict[str, str] = getattr(self.model, KEPT_REASONS)
        for name, reason in self.reasons.items():
            for weight, _ in self.model.get_submodule(name).named_parameters(recurse=False):
                noted[f"{name}.{weight}"] = reason
        hooks: list[RemovableHandle] = []
        borders = _borders(self.model, set(self.reasons)) if self.dtype != torch.float32 else ()
        for name, module in borders:
            here, there = torch.float32, self.dtype
            if name not in self.reasons:
                here, there = there, here
            hooks.append(module.register_forward_pre_hook(_CastInputs(here), with_kwargs=True))
            hooks.append(module.register_forward_hook(_CastResult(there)))
        return hooks


def end_float32(
    modules: Sequence[nn.Module], casts: Sequence[RemovableHandle], dtype: torch.dtype | None
) -> None:
    """Bring what a device map kept in float32 to `dtype`, without casts between; on the disk it stays."""
    if not any(tensor.is_meta for module in modules for tensor in module.parameters(recurse=False)):
        for module in modules:
            _cast_module(module, dtype)
        for hook in casts:
            hook.remove()


@dataclass(frozen=True)
class _CastInputs:
    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, self.dtype), _cast(kwargs, self.dtype)


@dataclass(frozen=True)
class _CastResult:
    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        return _cast(result, self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """All floating tensors in nested tuples, lists and mappings in `dtype`; a cache of keys stays."""
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda one: one.to(dtype) if one.is_floating_point() else one, value)


def _cast_module(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the floating tensors of a module, but not of those in it, to `dtype` (None: leave them)."""
    module._apply(lambda one: one.to(dtype) if one.is_floating_point() else one, recurse=False)


def _entry(device_map: DeviceMap, name: str) -> str:
    """The entry of a device map that a module falls under: its own or the nearest above; "" if none."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return name


def _borders(model: nn.Module, inside: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are called from the other side: `inside` from outside of it, or the other way round."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not name or isinstance(module, _NEVER_CALLED):
            continue
        caller = name.rpartition(".")[0]
        while isinstance(modules[caller], _NEVER_CALLED):
            caller = caller.rpartition(".")[0]
        if (name in inside) != (caller in inside):
            yield name, module

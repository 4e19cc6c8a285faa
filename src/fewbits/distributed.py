"""Quantized models in several processes: what FSDP needs to shard codes and scales without changing a bit.

FSDP2 casts floating parameters to the `param_dtype` of its mixed precision, and FSDP1 puts all parameters of
a unit into a flat one, which takes one floating dtype. float32 scales survive neither as they are. As buffers
they would be whole in every process, cast to the `buffer_dtype` of FSDP1, and refused by accelerate when it
loads into an FSDP2 model. So all parts become parameters of one dtype, bit by bit: an integer one, which no
cast touches, or the one that everything is cast to, which leaves nothing to cast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fewbits import columns
from fewbits.nn import QuantModule


def prepare(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make the quantized layers of `model` ready to be sharded, in place; call it before FSDP does.

    Every part of a weight becomes a frozen parameter of `dtype`, [n, 1], with the same bytes. None: the dtype
    that the codes are held as already (`quant_storage`), which is uint8 unless a config says otherwise. FSDP2
    takes any; with mixed precision a floating one must be its `param_dtype`. FSDP1 takes only the dtype of
    the parameters in the same unit, such as norms. Tied layers stay tied.

    ValueError for a dtype that codes cannot be held as, and for a model that is sharded already.
    """
    if dtype is not None and dtype not in columns.DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in columns.DTYPES)
        raise ValueError(f"cannot hold codes as {dtype}; use one of {known}")
    layers = [(name, layer, _codes(name, layer)) for name, layer in _quantized(model)]
    first: dict[int, QuantModule] = {}
    for _, layer, codes in layers:
        one = first.setdefault(id(codes), layer)
        if one is layer:
            layer.hold(dtype or getattr(torch, layer.scheme.storage_dtype))
        else:
            layer.share(one)


def prepare_loaded(model: nn.Module, dtype: torch.dtype) -> bool:
    """`prepare` a model of `dtype` that one of several processes has loaded; whether it was.

    Processes count by WORLD_SIZE, which torchrun and `accelerate launch` set. Where the latter asks for FSDP1
    and codes are held as integers, which FSDP1 cannot flatten, they get the dtype of the model. Models that
    are partly on the disk stay as they are.
    """
    layers = [layer for _, layer in _quantized(model)]
    if int(os.environ.get("WORLD_SIZE") or "1") < 2 or not layers:
        return False
    if any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
        return False
    first = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    first = first and os.environ.get("FSDP_VERSION") == "1"
    storage = [getattr(torch, layer.scheme.storage_dtype) for layer in layers]
    prepare(model, dtype if first and not any(one.is_floating_point for one in storage) else None)
    return True


def unheld_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with all parts in their own dtypes, as files have them; None if they are anyway."""
    if not any(layer.held for _, layer in _quantized(model)):
        return None
    state: dict[str, Tensor] = model.state_dict()
    seen: dict[int, Tensor] = {}
    for name, layer in _quantized(model):
        for attribute, tensor in layer.unheld().items():
            key, known = f"{name}.{attribute}" if name else attribute, id(getattr(layer, attribute)) in seen
            state[key] = seen.setdefault(id(getattr(layer, attribute)), tensor)
            if known and attribute not in layer.weights():  # scales are stored once, with the first layer
                del state[key]
    return state


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            yield name, module


def _codes(name: str, layer: QuantModule) -> nn.Parameter:
    """The codes of a layer, of the first weight if it has several; ValueError where it is sharded."""
    attribute = next(iter(layer.part_names(next(iter(layer.weights()))).values()))
    codes = layer._parameters.get(attribute)
    if codes is None or hasattr(codes, "full_tensor"):
        raise ValueError(f"{name} is sharded already; call fewbits.distributed.prepare(model) before that")
    return codes

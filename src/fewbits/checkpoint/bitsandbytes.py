"""The bitsandbytes schema: how its checkpoints hold NF4, FP4 and LLM.int8() weights.

4 bit, for a layer `x` (bitsandbytes.nn.Linear4bit):

    x.weight                                uint8 [ceil(n / 2), 1], or the same bytes as another dtype
    x.weight.absmax                         float32 [groups]; uint8 under double quantization
    x.weight.quant_map                      float32 [16], the codebook
    x.weight.nested_absmax                  float32 [ceil(groups / 256)]     double quantization only
    x.weight.nested_quant_map               float32 [256]                    double quantization only
    x.weight.quant_state.bitsandbytes__nf4  uint8, JSON text: type, block size, dtype, shape, nested_*

8 bit (bitsandbytes.nn.Linear8bitLt): x.weight int8 [out, in], x.SCB float32 [out] (the absolute maximum of
each row), x.weight_format uint8 scalar 0.

Everything read is checked before it is used: files are foreign.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.codebook import CODEBOOKS
from fewbits.format import Format, Scheme
from fewbits.tensor import QuantizedTensor

# Keys of one layer, behind its name. The first is what a plain layer has, too.
KEYS_4BIT = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)
KEYS_8BIT = ("weight", "SCB", "weight_format")
KEYS = (*KEYS_4BIT, *KEYS_8BIT[1:])
# Keys that only a quantized layer has.
MARKS = ("weight.absmax", "SCB")

_STATE = "weight.quant_state.bitsandbytes__"
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE_BYTES = 4096  # of JSON text; real ones have under 300
_FLOAT32_MAX = torch.finfo(torch.float32).max
_WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def can_store(scheme: Scheme) -> bool:
    """Whether this schema has a place for weights in the format of `scheme`."""
    weight = scheme.weight
    if str(weight) == "int8:row":
        return True
    nested = isinstance(weight.scale, Format)
    return (
        weight.family in ("nf4", "fp4")
        and weight.group.columns in _BLOCK_SIZES
        and not weight.offset
        and (weight.scale == "f32" or (nested and str(weight).endswith(":dq")))
    )


def to_file(weight: QuantizedTensor, storage_dtype: str = "uint8") -> dict[str, Tensor]:
    """The tensors of one layer by key behind its name, as bitsandbytes writes them.

    `storage_dtype` is what the bytes of 4-bit codes are viewed as. A weight on the meta device gives the
    shapes that any of its shape has, and of the JSON text the greatest length. ValueError for a format that
    the schema cannot store.
    """
    if not can_store(Scheme(weight.format)):
        raise ValueError(f"bitsandbytes files hold nf4, fp4 and int8:row, not {weight.format}")
    if weight.format.family == "int8":
        assert isinstance(weight.scale, Tensor)
        mark = torch.zeros((), dtype=torch.uint8, device=weight.device)
        return {"weight": weight.codes, "SCB": weight.scale.view(-1), "weight_format": mark}
    codes = weight.codes.view(-1).view(getattr(torch, storage_dtype)).view(-1, 1)
    family = weight.format.family
    state: dict[str, Any] = {
        "quant_type": family,
        "blocksize": weight.format.group.columns,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    found = {"weight": codes, "weight.quant_map": _map(family, weight.device)}
    if isinstance(weight.scale, QuantizedTensor):
        nested = weight.scale
        assert isinstance(nested.scale, Tensor)
        assert nested.offset is not None
        found["weight.absmax"] = nested.codes
        found["weight.nested_absmax"] = nested.scale
        found["weight.nested_quant_map"] = _map("dynamic8", weight.device)
        state |= {
            "nested_blocksize": nested.format.group.columns,
            "nested_dtype": "float32",
            # Its digits are known only with the weights; -1.2345678901234567e-123 is the longest.
            "nested_offset": "?" * 22 if nested.offset.is_meta else nested.offset.item(),
        }
    else:
        found["weight.absmax"] = weight.scale
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=weight.device)
    return found | {f"{_STATE}{family}": text}


def has_open_length(key: str) -> bool:
    """Whether the tensor called `key` is text, whose length may depend on the values of the weight."""
    return _STATE in key


def from_file(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """The quantized weight of layer `name`, from its tensors by key; codes become uint8 again, no copy.

    ValueError, naming the layer, for anything missing, malformed, out of range or inconsistent.
    """
    whole = "weight" in tensors
    if "SCB" in tensors and whole:
        return _from_8bit(tensors, name)
    states = [key for key in tensors if key.startswith(_STATE)]
    if len(states) != 1 or "weight.absmax" not in tensors or not whole:
        raise ValueError(
            f"{name} is not a whole bitsandbytes weight: it has {', '.join(sorted(tensors))} and needs "
            "weight, weight.absmax and one weight.quant_state; the checkpoint is incomplete"
        )
    state = _state(tensors[states[0]], name, nested="weight.nested_absmax" in tensors)
    if states[0] != f"{_STATE}{state['quant_type']}":
        raise ValueError(f"{name}: {states[0]} says quant_type {state['quant_type']!r}")
    family, shape = str(state["quant_type"]), torch.Size(state["shape"])
    nested = "weight.nested_absmax" in tensors
    format = Format.parse(f"{family}:g{state['blocksize']}" + (":dq" if nested else ""))
    _check_map(tensors.get("weight.quant_map"), family, f"{name}.weight.quant_map")
    parts = {"codes": _bytes(tensors["weight"], name)}
    absmax = tensors["weight.absmax"]
    if nested:
        key = "weight.nested_quant_map"
        _check_map(tensors.get(key), "dynamic8", f"{name}.{key}")
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=absmax.device)
        parts |= {
            "scale.codes": absmax,
            "scale.scale": tensors["weight.nested_absmax"],
            "scale.offset": offset,
        }
    else:
        parts["scale"] = _float_absmax(absmax, format, shape, name)
    return QuantizedTensor.from_parts(parts, format, shape, getattr(torch, state["dtype"]), name)


def _from_8bit(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    codes, scale = tensors["weight"], tensors["SCB"]
    layout = tensors.get("weight_format")
    if layout is not None and (layout.numel() != 1 or int(layout) != 0):
        raise ValueError(
            f"{name}.weight_format is {layout.tolist()}; only 0 (row-major) is known. Load and save the "
            "checkpoint once with a current bitsandbytes"
        )
    parts = {"codes": codes, "scale": scale.view(-1, 1)}
    return QuantizedTensor.from_parts(parts, "int8:row", codes.shape, torch.float16, name)


def _bytes(codes: Tensor, name: str) -> Tensor:
    if not codes.is_contiguous():
        raise ValueError(f"{name}.weight is not contiguous")
    return codes.view(-1).view(torch.uint8).view(-1, 1)


def _float_absmax(absmax: Tensor, format: Format, shape: torch.Size, name: str) -> Tensor:
    """float32 [groups]. bitsandbytes' AVX-512 path leaves it as bfloat16 [columns / block, rows] instead."""
    if absmax.dtype == torch.bfloat16 and absmax.dim() == 2:
        grid = format.group.grid(shape)[0]
        rows = shape[0] if len(shape) == 2 else 0
        if absmax.shape[1] != rows or absmax.numel() != grid:
            raise ValueError(f"{name}.weight.absmax {list(absmax.shape)} does not fit a weight {list(shape)}")
        return absmax.T.reshape(-1).float()
    return absmax


def _state(text: Tensor, name: str, *, nested: bool) -> dict[str, Any]:
    """The JSON of a quant_state, every value checked."""
    where = f"{name}.weight.quant_state"
    if text.dtype != torch.uint8 or text.numel() > _STATE_BYTES:
        raise ValueError(f"{where} is {text.dtype} of {text.numel()} elements, not short JSON text in uint8")
    try:
        state = json.loads(bytes(text.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{where} is not a JSON object: {state!r}")
    shape, offset = state.get("shape"), state.get("nested_offset", math.nan if nested else 0.0)
    sizes = shape if isinstance(shape, list) else [-1]
    sizes_fine = all(type(size) is int and 0 <= size < 2**40 for size in sizes)
    checks = {
        "quant_type": state.get("quant_type") in ("nf4", "fp4"),
        "blocksize": type(state.get("blocksize")) is int and state["blocksize"] in _BLOCK_SIZES,
        "dtype": state.get("dtype") in _WEIGHT_DTYPES,
        "shape": sizes_fine and math.prod(sizes) < 2**60,
        "nested_blocksize": state.get("nested_blocksize", 256) == 256,
        # What bitsandbytes decodes the scales in; here that is always float32.
        "nested_dtype": state.get("nested_dtype", "float32") in _WEIGHT_DTYPES,
        "nested_offset": type(offset) in (float, int) and -_FLOAT32_MAX <= offset <= _FLOAT32_MAX,
    }
    if wrong := [key for key, fine in checks.items() if not fine]:
        got = ", ".join(f"{key} {state.get(key)!r}" for key in wrong)
        raise ValueError(f"{where} has {got}, which fewbits cannot read; the file is damaged or foreign")
    return state


def _map(codebook: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[codebook].values, dtype=torch.float32, device=device)


def _check_map(stored: Tensor | None, codebook: str, where: str) -> None:
    """Codes mean what the codebook says; a file with other values would decode wrong."""
    if stored is None or stored.is_meta:
        return
    wanted = _map(codebook, stored.device)
    if stored.shape != wanted.shape or not torch.allclose(stored.float(), wanted, rtol=1e-6, atol=1e-9):
        raise ValueError(f"{where} holds other values than {codebook}; fewbits would decode it wrong")

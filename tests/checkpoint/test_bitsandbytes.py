"""The bitsandbytes schema: round trips, and damaged or foreign files."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewbits
from fewbits.checkpoint import bitsandbytes as schema
from fewbits.format import Scheme
from fewbits.tensor import QuantizedTensor

NAME = "model.layers.7.mlp.up_proj"
STATE = "weight.quant_state.bitsandbytes__"
STORABLE = (
    *("nf4:g64", "nf4:g32", "nf4:g128", "nf4:g4096", "fp4:g64", "fp4:g256"),
    *("nf4:g64:dq", "fp4:g64:dq", "nf4:g128:dq", "int8:row"),
)


# --- to_file, from_file -----------------------------------------------------------------------------


def quantized(
    format: str, shape: tuple[int, ...] = (6, 96), dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    return fewbits.quantize(torch.randn(shape).to(dtype), format)


def layer_file(format: str = "nf4:g64", size: tuple[int, ...] = (6, 96), **state: Any) -> dict[str, Tensor]:
    """The tensors of a layer, with entries of its JSON changed (... removes one)."""
    tensors = dict(_whole_file(format, size))
    if state:
        (key,) = [key for key in tensors if key.startswith(STATE)]
        changed = json.loads(bytes(tensors[key].tolist())) | state
        tensors[key] = text({name: value for name, value in changed.items() if value is not ...})
    return tensors


@lru_cache
def _whole_file(format: str, size: tuple[int, ...]) -> dict[str, Tensor]:
    return schema.to_file(quantized(format, size))


def text(state: object) -> Tensor:
    content = state if isinstance(state, str) else json.dumps(state)
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 96), (64, 64), (1, 2), (3, 5), (0, 64), (300, 70)])
@pytest.mark.parametrize("format", STORABLE)
def test_what_is_written_is_read_back_equal(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = quantized(format, shape, torch.float16 if format == "int8:row" else dtype)
    assert schema.from_file(schema.to_file(weight), NAME) == weight


@pytest.mark.parametrize("storage", ["uint8", "int8", "float16", "bfloat16", "float32", "float64"])
def test_codes_in_any_storage_dtype_are_read_back_equal(storage: str) -> None:
    weight = quantized("nf4:g64:dq", (16, 96))
    tensors = schema.to_file(weight, storage)
    assert tensors["weight"].dtype == getattr(torch, storage)
    assert tensors["weight"].shape == (16 * 96 // 2 // tensors["weight"].element_size(), 1)
    assert schema.from_file(tensors, NAME) == weight


def test_reading_does_not_copy_codes() -> None:
    tensors = schema.to_file(quantized("nf4:g64", (16, 96)), "bfloat16")
    assert schema.from_file(tensors, NAME).codes.data_ptr() == tensors["weight"].data_ptr()


def test_a_4bit_layer_is_written_under_the_names_shapes_and_dtypes_of_bitsandbytes() -> None:
    tensors = schema.to_file(quantized("nf4:g64:dq", (300, 70), torch.bfloat16))
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    del found[f"{STATE}nf4"]
    assert found == {
        "weight": ((10500, 1), torch.uint8),
        "weight.absmax": ((329,), torch.uint8),
        "weight.quant_map": ((16,), torch.float32),
        "weight.nested_absmax": ((2,), torch.float32),
        "weight.nested_quant_map": ((256,), torch.float32),
    }
    state = json.loads(bytes(tensors[f"{STATE}nf4"].tolist()))
    offset = state.pop("nested_offset")
    assert offset == float(torch.tensor(offset, dtype=torch.float32)) > 0
    assert list(state.items()) == [
        ("quant_type", "nf4"),
        ("blocksize", 64),
        ("dtype", "bfloat16"),
        ("shape", [300, 70]),
        ("nested_blocksize", 256),
        ("nested_dtype", "float32"),
    ]


def test_an_int8_layer_is_written_under_the_names_shapes_and_dtypes_of_bitsandbytes() -> None:
    weight = torch.randn(6, 96).half()
    tensors = schema.to_file(fewbits.quantize(weight, "int8:row"))
    assert sorted(tensors) == ["SCB", "weight", "weight_format"]
    assert (tensors["weight"].dtype, tensors["weight"].shape) == (torch.int8, (6, 96))
    assert torch.equal(tensors["SCB"], weight.float().abs().amax(1))
    assert (tensors["weight_format"].dtype, tensors["weight_format"].shape) == (torch.uint8, ())
    assert int(tensors["weight_format"]) == 0


@pytest.mark.parametrize(
    ("scheme", "storable"),
    [
        *((format, True) for format in STORABLE),
        ("int8:row@int8:t6", True),
        ("nf4:g512", True),
        ("nf4:g1024", True),
        ("nf4:g2048", True),
        ("nf4:g16", False),
        ("nf4:g48", False),
        ("nf4:g8192", False),
        ("nf4:g64:f16", False),
        ("nf4:g64:bf16", False),
        ("nf4:g64:offset", False),
        ("nf4:g64:dq:offset", False),
        ("int8:row:f16", False),
        ("int8:row:zero", False),
        ("int8:g64", False),
        ("int8:tensor", False),
        ("int4:g64", False),
        ("int4:g64:f16:zero", False),
        ("dynamic8:g64", False),
        ("fp8_e4m3:row", False),
        ("mxfp4", False),
        ("nvfp4", False),
    ],
)
def test_only_formats_of_bitsandbytes_can_be_stored(scheme: str, storable: bool) -> None:
    parsed = Scheme.parse(scheme)
    assert schema.can_store(parsed) is storable
    if not storable:
        weight = fewbits.quantize(torch.randn(64, 64), parsed.weight)
        with pytest.raises(ValueError, match=f"not {parsed.weight}"):
            schema.to_file(weight)


def test_the_transposed_bfloat16_scales_of_the_avx512_path_are_understood() -> None:
    tensors = layer_file(size=(6, 128))
    absmax = tensors["weight.absmax"].bfloat16()
    canonical = schema.from_file(tensors | {"weight.absmax": absmax.float()}, NAME)
    transposed = schema.from_file(tensors | {"weight.absmax": absmax.view(6, 2).T.contiguous()}, NAME)
    assert transposed == canonical


def test_a_file_without_the_maps_is_read_by_its_quant_type() -> None:
    tensors = layer_file("nf4:g64:dq")
    maps = ("weight.quant_map", "weight.nested_quant_map")
    bare = {key: tensor for key, tensor in tensors.items() if key not in maps}
    assert schema.from_file(bare, NAME) == schema.from_file(tensors, NAME)


def test_an_int8_layer_without_a_weight_format_is_read_as_rows() -> None:
    tensors = layer_file("int8:row")
    bare = {key: tensor for key, tensor in tensors.items() if key != "weight_format"}
    assert schema.from_file(bare, NAME) == schema.from_file(tensors, NAME)


# --- damaged and foreign files ----------------------------------------------------------------------


def refuses(tensors: dict[str, Tensor]) -> None:
    """Reading them is a ValueError that names the layer."""
    with pytest.raises(ValueError, match=NAME.replace(".", r"\.")):
        schema.from_file(tensors, NAME)


@pytest.mark.parametrize("missing", ["weight", "weight.absmax", f"{STATE}nf4"])
@pytest.mark.parametrize("format", ["nf4:g64", "nf4:g64:dq"])
def test_a_4bit_layer_with_a_tensor_missing_is_refused(format: str, missing: str) -> None:
    tensors = layer_file(format)
    del tensors[missing]
    refuses(tensors)


def test_double_quantization_with_its_inner_scales_missing_is_refused() -> None:
    tensors = layer_file("nf4:g64:dq")
    del tensors["weight.nested_absmax"]
    refuses(tensors)


def test_an_int8_layer_without_codes_is_refused() -> None:
    tensors = layer_file("int8:row")
    del tensors["weight"]
    refuses(tensors)


def test_two_quant_states_are_refused() -> None:
    tensors = layer_file()
    refuses(tensors | {f"{STATE}fp4": tensors[f"{STATE}nf4"]})


@pytest.mark.parametrize(
    "content",
    ["", "nf4", "{", '{"quant_type": "nf4",}', "[]", '"nf4"', "1", "null", "NaN", "[" * 4000, '{"a":' * 800],
    ids=lambda content: content[:12],
)
def test_a_quant_state_that_is_no_json_object_is_refused(content: str) -> None:
    refuses(layer_file() | {f"{STATE}nf4": text(content)})


def test_a_quant_state_that_is_no_text_is_refused() -> None:
    refuses(layer_file() | {f"{STATE}nf4": torch.tensor([255, 254, 253, 128], dtype=torch.uint8)})
    tensors = layer_file()
    refuses(tensors | {f"{STATE}nf4": tensors[f"{STATE}nf4"].float()})


def test_a_huge_quant_state_is_refused() -> None:
    tensors = layer_file()
    padding = torch.full((10**6,), ord(" "), dtype=torch.uint8)
    refuses(tensors | {f"{STATE}nf4": torch.cat([tensors[f"{STATE}nf4"], padding])})


@pytest.mark.parametrize("quant_type", ["int8", "NF4", "fp4", "", None, 4, ["nf4"], {"nf4": 1}, ...])
def test_another_quant_type_than_the_key_says_is_refused(quant_type: object) -> None:
    refuses(layer_file(quant_type=quant_type))


def test_another_quant_type_than_the_key_says_is_refused_in_a_file_without_a_map() -> None:
    tensors = layer_file(quant_type="fp4")
    del tensors["weight.quant_map"]
    refuses(tensors)


@pytest.mark.parametrize(
    "blocksize", [0, 1, -64, 63, 16, 8192, 2**70, 64.0, 64.5, math.nan, "64", True, None, [64], ...]
)
def test_a_block_size_that_bitsandbytes_does_not_have_is_refused(blocksize: object) -> None:
    refuses(layer_file(blocksize=blocksize))


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "int8", "torch.float16", "nn", "", None, 16, ["float16"], ...]
)
def test_a_dtype_that_no_weight_has_is_refused(dtype: object) -> None:
    refuses(layer_file(dtype=dtype))


@pytest.mark.parametrize(
    "shape",
    [
        *([-6, 96], [6, -96], [-6, -96], [2**31, 2**31], [2**40, 1], [2**39] * 5, [2**70]),
        *([True, 576], [6.0, 96], ["6", 96], [None, 96], [[6], 96], [], [6], [6, 95], [7, 96], [0, 96]),
        *("6x96", 576, {"0": 6}, None, ...),
    ],
    ids=str,
)
def test_a_shape_that_the_codes_do_not_have_is_refused(shape: object) -> None:
    refuses(layer_file(shape=shape))


@pytest.mark.parametrize(
    "offset",
    ["0.5", None, [0.5], True, 10**400, 1e39, -1e39, 1e308, ...],
    ids=lambda offset: str(offset)[:12],
)
def test_a_nested_offset_that_is_no_float32_number_is_refused(offset: object) -> None:
    refuses(layer_file("nf4:g64:dq", nested_offset=offset))


@pytest.mark.parametrize("offset", [math.nan, math.inf, -math.inf])
def test_a_nested_offset_that_is_not_finite_is_refused(offset: float) -> None:
    refuses(layer_file("nf4:g64:dq", nested_offset=offset))


@pytest.mark.parametrize("size", [64, 0, 255, "256", None, [256]])
def test_another_nested_block_size_than_256_is_refused(size: object) -> None:
    refuses(layer_file("nf4:g64:dq", nested_blocksize=size))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_that_nested_scales_were_decoded_in_makes_no_difference(dtype: str) -> None:
    tensors = layer_file("nf4:g64:dq")
    (key,) = [key for key in tensors if key.startswith(STATE)]
    state = json.loads(bytes(tensors[key].tolist()))
    changed = tensors | {key: text(state | {"nested_dtype": dtype})}
    assert schema.from_file(changed, NAME) == schema.from_file(tensors, NAME)


@pytest.mark.parametrize("dtype", ["int8", "torch.float32", "", None, 32, ["float32"]])
def test_a_nested_dtype_that_no_scale_has_is_refused(dtype: object) -> None:
    refuses(layer_file("nf4:g64:dq", nested_dtype=dtype))


def _swapped(values: Tensor) -> Tensor:
    return torch.cat([values[1:2], values[:1], values[2:]])


@pytest.mark.parametrize(
    "change",
    [
        *(lambda m: m * 2, lambda m: m + 1e-3, lambda m: m[:-1], lambda m: m[:0], lambda m: m.view(2, -1)),
        *(lambda m: m * math.nan, lambda m: -m, lambda m: torch.cat([m, m]), _swapped),
    ],
)
@pytest.mark.parametrize("which", ["weight.quant_map", "weight.nested_quant_map"])
def test_other_values_in_the_maps_are_refused(which: str, change: Any) -> None:
    tensors = layer_file("fp4:g64:dq")
    refuses(tensors | {which: change(tensors[which])})


def test_the_map_of_the_other_4bit_type_is_refused() -> None:
    tensors = layer_file("nf4:g64")
    refuses(tensors | {"weight.quant_map": layer_file("fp4:g64")["weight.quant_map"]})


@pytest.mark.parametrize(
    "absmax",
    [
        *(torch.ones(8), torch.ones(10), torch.ones(9, 1), torch.ones(0), torch.ones(())),
        *(torch.ones(9, dtype=torch.float16), torch.ones(9, dtype=torch.float64)),
        *(torch.ones(9, dtype=torch.uint8), torch.ones(9, dtype=torch.bfloat16)),
        *(torch.ones(1, 9, dtype=torch.bfloat16), torch.ones(2, 6, dtype=torch.bfloat16)),
        torch.ones(3, 3, dtype=torch.bfloat16),
    ],
    ids=lambda tensor: f"{str(tensor.dtype)[6:]}{list(tensor.shape)}",
)
def test_scales_of_another_shape_or_dtype_are_refused(absmax: Tensor) -> None:
    refuses(layer_file() | {"weight.absmax": absmax})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight.absmax", torch.ones(9)),
        ("weight.absmax", torch.ones(8, dtype=torch.uint8)),
        ("weight.absmax", torch.ones(9, dtype=torch.int8)),
        ("weight.nested_absmax", torch.ones(2)),
        ("weight.nested_absmax", torch.ones(())),
        ("weight.nested_absmax", torch.ones(1, dtype=torch.float16)),
    ],
)
def test_nested_scales_of_another_shape_or_dtype_are_refused(key: str, value: Tensor) -> None:
    refuses(layer_file("nf4:g64:dq") | {key: value})


def test_codes_of_another_length_or_layout_are_refused() -> None:
    tensors = layer_file()
    codes = tensors["weight"]
    for wrong in (codes[:-1], codes[:0], torch.cat([codes, codes]), codes.float(), codes.expand(-1, 2)):
        refuses(tensors | {"weight": wrong})


@pytest.mark.parametrize("layout", [1, 2, 255])
def test_int8_codes_in_another_order_than_rows_are_refused(layout: int) -> None:
    refuses(layer_file("int8:row") | {"weight_format": torch.tensor(layout, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SCB", torch.ones(5)),
        ("SCB", torch.ones(7)),
        ("SCB", torch.ones(6, dtype=torch.float16)),
        ("SCB", torch.ones(0)),
        ("weight", torch.ones(6, 96, dtype=torch.uint8)),
        ("weight", torch.ones(6, 96)),
        ("weight", torch.ones(6, dtype=torch.int8)),
        ("weight", torch.ones((), dtype=torch.int8)),
        ("weight", torch.ones(6, 96, 1, dtype=torch.int8)),
        ("weight_format", torch.zeros(2, dtype=torch.uint8)),
    ],
)
def test_an_int8_layer_of_another_shape_or_dtype_is_refused(key: str, value: Tensor) -> None:
    refuses(layer_file("int8:row") | {key: value})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "quant_type": st.sampled_from(["nf4", "fp4", "int8"]),
    "blocksize": st.sampled_from([32, 64, 96, 128, 4096, 64.0, -64, 0, 2**64]),
    "dtype": st.sampled_from(["float16", "float32", "bfloat16", "float64", "uint8", "Tensor"]),
    "shape": st.lists(st.integers(-1, 600) | st.integers(), max_size=4) | st.permutations([6, 96, 1]),
    "nested_blocksize": st.sampled_from([256, 256.0, 64, 0]),
    "nested_dtype": st.sampled_from(["float32", "float16", "uint8"]),
    "nested_offset": st.floats() | st.integers(),
}


@st.composite
def _mutations(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(list(_KNOWN)), min_size=1, max_size=3, unique=True))
    return {key: draw(_KNOWN[key] | _JSON | st.just(...)) for key in keys}


@settings(max_examples=400, deadline=None)
@given(format=st.sampled_from(["nf4:g64", "nf4:g64:dq", "fp4:g64"]), changes=_mutations())
def test_any_changed_quant_state_is_refused_or_read_as_a_whole_weight(
    format: str, changes: dict[str, Any]
) -> None:
    _refused_or_whole(layer_file(format, **changes))


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(0, 200),
    content=st.binary(min_size=1, max_size=4),
    format=st.sampled_from(["nf4:g64", "nf4:g64:dq"]),
)
def test_any_damaged_bytes_of_a_quant_state_are_refused_or_read_as_a_whole_weight(
    place: int, content: bytes, format: str
) -> None:
    tensors = layer_file(format)
    state = tensors[f"{STATE}nf4"].tolist()
    place = min(place, len(state) - 1)
    state[place : place + len(content)] = list(content)
    _refused_or_whole(tensors | {f"{STATE}nf4": torch.tensor(state, dtype=torch.uint8)})


def _refused_or_whole(tensors: dict[str, Tensor]) -> None:
    """A ValueError that names the layer, or a weight whose parts fit and whose values are finite."""
    try:
        weight = schema.from_file(tensors, NAME)
    except ValueError as error:
        if NAME not in str(error):
            raise AssertionError(f"{error!r} does not say which layer") from error
        return
    assert (math.prod(weight.shape) + 1) // 2 == 6 * 96 // 2
    decoded = weight.dequantize(torch.float32)
    assert decoded.shape == weight.shape
    assert bool(decoded.isfinite().all())
    assert QuantizedTensor.from_parts(weight.parts(), weight.format, weight.shape, weight.dtype) == weight

"""A quantized weight as plain tensors: taken apart, put together, compared, moved."""

import dataclasses

import pytest
import torch

from fewbits.ops import quantize
from fewbits.tensor import QuantizedTensor

PARTS = {
    "nf4:g64": ["codes", "scale"],
    "nf4:g64:dq": ["codes", "scale.codes", "scale.scale", "scale.offset"],
    "nf4:g64:offset": ["codes", "scale", "offset"],
    "fp4:g32:bf16": ["codes", "scale"],
    "dynamic8": ["codes", "scale"],
    "int8:row": ["codes", "scale"],
    "int4:g32:f16:zero": ["codes", "scale", "zero"],
    "int3:row:dq:zero": ["codes", "scale.codes", "scale.scale", "scale.offset", "zero"],
    "fp8_e4m3:b4x8": ["codes", "scale"],
    "mxfp4": ["codes", "scale"],
    "nvfp4": ["codes", "scale.codes", "scale.scale"],
}
SHAPES = [(5, 33), (7,), (), (0, 4), (4, 0), (2, 3, 5)]
every_format = pytest.mark.parametrize("spelling", PARTS)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_go_out_and_in_again_by_name_and_by_order(spelling, shape):
    weight = quantize(torch.randn(shape), spelling)
    parts = weight.parts()
    assert list(parts) == PARTS[spelling]
    for given in (parts, dict(reversed(parts.items())), list(parts.values()), iter(parts.values())):
        again = QuantizedTensor.from_parts(given, spelling, shape, weight.dtype)
        assert again == weight
        assert all(again.parts()[name] is part for name, part in parts.items()), "no copy"


@every_format
def test_a_nested_scale_is_a_quantized_tensor_of_its_own(spelling):
    weight = quantize(torch.randn(5, 33), spelling)
    nested = any(name.startswith("scale.") for name in PARTS[spelling])
    assert isinstance(weight.scale, QuantizedTensor if nested else torch.Tensor)
    if nested:
        assert weight.scale.shape == torch.Size(weight.format.group.grid((5, 33)))
        assert weight.scale.format == weight.format.scale


@every_format
def test_every_missing_part_is_named(spelling):
    parts = quantize(torch.randn(5, 33), spelling).parts()
    for name in parts:
        rest = {key: part for key, part in parts.items() if key != name}
        with pytest.raises(ValueError, match=rf"^layer\.weight: {spelling}.* codes, .*; missing {name}$"):
            QuantizedTensor.from_parts(rest, spelling, (5, 33), name="layer.weight")


def test_an_unknown_part_is_named():
    parts = quantize(torch.randn(5, 33), "nf4:g64").parts() | {"absmax": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^w: nf4:g64 is stored in codes, scale; unknown absmax$"):
        QuantizedTensor.from_parts(parts, "nf4:g64", (5, 33), name="w")


def test_a_wrong_number_of_parts_in_order_says_which_belong():
    parts = list(quantize(torch.randn(5, 33), "nf4:g64").parts().values())
    for wrong in (parts[:1], [*parts, parts[0]], []):
        with pytest.raises(ValueError, match=rf"^w: nf4:g64 is stored in .*codes, scale; got {len(wrong)}"):
            QuantizedTensor.from_parts(wrong, "nf4:g64", (5, 33), name="w")


@every_format
def test_every_part_of_wrong_shape_or_dtype_is_named_with_what_it_should_be(spelling):
    parts = quantize(torch.randn(5, 33), spelling).parts()
    for name, part in parts.items():
        for wrong in (part.new_zeros(*part.shape, 1), part.to(torch.float64)):
            with pytest.raises(ValueError, match=rf"^w: {name} of a \[5, 33\] weight in {spelling}") as error:
                QuantizedTensor.from_parts(parts | {name: wrong}, spelling, (5, 33), name="w")
            assert f"{part.dtype} {list(part.shape)}; got {wrong.dtype}" in str(error.value)
            assert str(error.value).endswith(str(list(wrong.shape)))


def test_parts_of_another_shape_are_refused():
    weight = quantize(torch.randn(4, 64), "int8:row")
    with pytest.raises(ValueError, match="codes of a \\[64, 4\\] weight"):
        QuantizedTensor.from_parts(weight.parts(), "int8:row", (64, 4))


@every_format
def test_equality_sees_every_stored_bit(spelling):
    weight = quantize(torch.randn(5, 33), spelling)
    same = QuantizedTensor.from_parts({k: v.clone() for k, v in weight.parts().items()}, spelling, (5, 33))
    assert weight == same
    for name in weight.parts():
        changed = {key: part.clone() for key, part in weight.parts().items()}
        raw = changed[name].view(-1).view(torch.uint8)
        raw[0] ^= 1
        assert weight != QuantizedTensor.from_parts(changed, spelling, (5, 33)), name


def test_equality_sees_format_shape_and_dtype():
    weight = quantize(torch.randn(4, 64), "nf4:g64")
    parts = weight.parts()
    assert weight != QuantizedTensor.from_parts(parts, "fp4:g64", (4, 64))
    assert weight != QuantizedTensor.from_parts(parts, "nf4:g64", (2, 128))
    assert weight != QuantizedTensor.from_parts(parts, "nf4:g64", (4, 64), torch.float16)
    assert weight != "nf4:g64"
    with pytest.raises(TypeError, match="unhashable"):
        hash(weight)


def test_it_is_frozen():
    weight = quantize(torch.randn(4, 64), "nf4:g64")
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.codes = weight.codes


@every_format
def test_bytes_are_those_of_all_parts(spelling):
    weight = quantize(torch.randn(5, 33), spelling)
    total = sum(part.numel() * part.element_size() for part in weight.parts().values())
    assert weight.nbytes == total
    assert weight.bits_per_weight == 8 * total / 165
    assert quantize(torch.randn(0, 4), spelling).bits_per_weight == 0.0


def test_repr_says_format_shape_cost_and_place():
    text = repr(quantize(torch.randn(64, 64, dtype=torch.bfloat16), "nf4:g64"))
    assert text == (
        "QuantizedTensor(nf4:g64, shape=[64, 64], 4.500 bits per weight, dtype=torch.bfloat16, device=cpu)"
    )


@every_format
def test_to_moves_every_part_and_keeps_the_rest(spelling):
    weight = quantize(torch.randn(5, 33, dtype=torch.float16), spelling)
    moved = weight.to("meta")
    assert moved.device.type == "meta"
    assert {part.device.type for part in moved.parts().values()} == {"meta"}
    assert (moved.format, moved.shape, moved.dtype) == (weight.format, weight.shape, weight.dtype)
    assert weight.to("cpu") == weight
    assert weight.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_decoding_returns_the_dtype_that_was_quantized_unless_told_another(dtype):
    weight = quantize(torch.randn(4, 64, dtype=dtype), "nf4:g64")
    assert weight.dequantize().dtype == dtype
    assert torch.equal(weight.dequantize(), weight.dequantize(torch.float32).to(dtype))


def test_nothing_is_a_tensor_subclass():
    for spelling in PARTS:
        parts = quantize(torch.nn.Parameter(torch.randn(5, 33)), spelling).parts().values()
        assert {type(part) for part in parts} == {torch.Tensor}
        assert not any(part.requires_grad for part in parts)

"""Formats and schemes: their one spelling, their errors, and the bytes they take."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.format import Activation, Format, Group, Scheme, matrix_shape, packed_length
from fewbits.ops import quantize

FLAT = {"nf4": "g64", "fp4": "g64", "dynamic8": "g256", "udynamic8": "g256"}
GRID = {
    "int8": "row",
    "int4": "g128",
    "int3": "g128",
    "int2": "g64",
    "fp8_e4m3": "row",
    "fp8_e5m2": "row",
}
FIXED = {"mxfp4": "g32", "nvfp4": "g16"}
INTEGERS = ("int8", "int4", "int3", "int2")

sizes = st.integers(1, 2**24)


@st.composite
def spellings(draw) -> tuple[str, str]:
    """(a way to write a format, the canonical one)."""
    family = draw(st.sampled_from([*FLAT, *GRID, *FIXED]))
    default = {**FLAT, **GRID, **FIXED}[family]
    if family in FIXED:
        group = default
    elif family in FLAT:
        group = f"g{2 * draw(st.integers(1, 2**23)) if family in ('nf4', 'fp4') else draw(sizes)}"
    else:
        blocks = st.builds("b{}x{}".format, st.integers(2, 2**24), sizes)
        group = draw(st.sampled_from(["row", "tensor"]) | st.builds("g{}".format, sizes) | blocks)
    group = draw(st.sampled_from([group, default]))
    scale = draw(st.sampled_from(["f32"] if family in FIXED else ["f32", "f16", "bf16", "dq"]))
    zero = ["zero"] * (family in INTEGERS and draw(st.booleans()))
    offset = ["offset"] * (family in FLAT and draw(st.booleans()))
    canonical = ":".join([family, group, *([scale] if scale != "f32" else []), *zero, *offset])
    written = [family]
    if group != default or draw(st.booleans()):
        written.append(group)
    if scale != "f32" or (family not in FIXED and draw(st.booleans())):
        written.append(scale)
    return ":".join([*written, *zero, *offset]), canonical


@settings(max_examples=400, deadline=None)
@given(spellings())
def test_every_format_has_one_spelling_that_parses_back_to_it(case):
    text, canonical = case
    parsed = Format.parse(text)
    assert str(parsed) == canonical
    assert Format.parse(str(parsed)) == parsed
    assert hash(Format.parse(canonical)) == hash(parsed)


@settings(max_examples=200, deadline=None)
@given(spellings(), spellings())
def test_formats_are_equal_exactly_when_their_spellings_are(one, other):
    assert (Format.parse(one[0]) == Format.parse(other[0])) == (one[1] == other[1])


@pytest.mark.parametrize("family", [*FLAT, *GRID, *FIXED])
def test_a_bare_family_has_its_default_group(family):
    assert str(Format.parse(family)) == f"{family}:{ {**FLAT, **GRID, **FIXED}[family] }"


def test_a_format_passes_through_parse():
    parsed = Format.parse("nf4:g64")
    assert Format.parse(parsed) is parsed


def test_the_parts_of_a_spelling_mean_what_they_say():
    asymmetric = Format.parse("int4:g128:f16:zero")
    assert (asymmetric.group, asymmetric.scale, asymmetric.zero, asymmetric.offset) == (
        Group(1, 128), "f16", True, False,
    )  # fmt: skip
    assert asymmetric.codebook.bits == 4
    nested = Format.parse("nf4:g64:dq")
    assert nested.group == Group(1, 64, flat=True)
    assert isinstance(nested.scale, Format)
    assert (nested.scale.family, nested.scale.group.columns, nested.scale.offset) == ("dynamic8", 256, True)
    assert Format.parse("fp8_e4m3:b128x64").group == Group(128, 64)
    assert Format.parse("int8:tensor").group == Group(0, 0)
    assert isinstance(Format.parse("nvfp4").scale, Format)
    assert Format.parse("mxfp4").scale == "e8m0"


def test_int8_is_signed_alone_and_unsigned_with_zero_points():
    assert Format.parse("int8:row").codebook.signed
    assert not Format.parse("int8:row:zero").codebook.signed


@pytest.mark.parametrize(("wrong", "near"), [("nf5", "nf4"), ("fp8_e4m4", "fp8_e4m3"), ("mxpf4", "mxfp4")])
def test_an_unknown_family_is_answered_with_the_nearest_and_all_known(wrong, near):
    with pytest.raises(ValueError, match=rf"unknown format '{wrong}'.*did you mean '{near}'.*nvfp4"):
        Format.parse(f"{wrong}:g64")


def test_a_family_like_no_other_is_answered_with_all_known():
    with pytest.raises(ValueError, match=r"unknown format 'zzz' in 'zzz': Known: nf4, fp4") as error:
        Format.parse("zzz")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "what", "mend"),
    [
        ("nf4:row", "'row'", "even group size"),
        ("nf4:b2x64", "'b2x64'", "even group size"),
        ("fp4:g63", "'g63'", "even group size"),
        ("nf4:g0", "'g0'", "g64"),
        ("nf4:g33554432", "'g33554432'", "g64"),
        ("int4:b0x4", "'b0x4'", "b128x128"),
        ("int4:g064", "'g064'", "g128"),
        ("int4:b1x64", "'b1x64'", "g128"),
        ("mxfp4:g64", "'g64'", "g32 only"),
        ("nvfp4:row", "'row'", "g16 only"),
        ("nf4:g64:f64", "'f64'", "f32, f16, bf16 or dq"),
        ("nf4:g64:zero", "'zero'", "zero is for integers"),
        ("fp8_e4m3:row:zero", "'zero'", "zero is for integers"),
        ("int4:g128:offset", "'offset'", "offset for"),
        ("int4:f16:g128", "'g128'", r"\[:group\]\[:scale\]"),
        ("int4:zero:f16", "'f16'", r"\[:group\]\[:scale\]"),
        ("mxfp4:g32:f16", "'f16'", "mxfp4 and nvfp4 take none"),
        ("nf4:", "''", r"\[:group\]"),
        ("nf4:g64:dq:dq", "'dq'", r"\[:group\]"),
        ("int4:g128:zero:zero", "'zero'", r"\[:group\]"),
    ],
)
def test_an_error_names_the_wrong_word_and_what_to_write(text, what, mend):
    with pytest.raises(ValueError, match=rf"{what}.*{text}.*{mend}"):
        Format.parse(text)


@pytest.mark.parametrize("wrong", [4, 4.0, None, True])
def test_what_is_no_string_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="a format is a string such as 'nf4:g64'"):
        Format.parse(wrong)


def test_formats_are_immutable_and_hashable():
    parsed = Format.parse("nf4:g64:dq")
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.zero = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.group.columns = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme(parsed).storage_dtype = "int8"
    assert {parsed: 1}[Format.parse("nf4:dq")] == 1


# Bytes by hand: codes + scales + zero points + offset.
BYTES = {
    ("nf4:g64", (4096, 4096)): 2**23 + 2**18 * 4,
    ("nf4:g64", (5, 257)): 643 + 21 * 4,
    ("nf4:g64", ()): 1 + 4,
    ("nf4:g64", (0, 4)): 0,
    ("nf4:g64:dq", (4096, 4096)): 2**23 + 2**18 + 1024 * 4 + 4,
    ("nf4:g64:dq", (7,)): 4 + 1 + 4 + 4,
    ("nf4:g64:bf16", (5, 257)): 643 + 21 * 2,
    ("nf4:g64:offset", (5, 257)): 643 + 21 * 4 + 4,
    ("dynamic8", (3, 100)): 300 + 2 * 4,
    ("int8:row", (5, 257)): 1285 + 5 * 4,
    ("int8:row", ()): 1 + 4,
    ("int8:row", (0, 4)): 0,
    ("int8:g128:f16:zero", (5, 257)): 1285 + 5 * 3 * 2 + 5 * 3,
    ("int4:g128:f16:zero", (4096, 4096)): 2**23 + 2**17 * 2 + 2**17 // 2,
    ("int4:g128:f16:zero", (3, 5, 33)): 15 * 17 + 15 * 2 + 15,
    ("int3:g32:zero", (5, 33)): 5 * 13 + 5 * 2 * 4 + 5 * 1,
    ("int2:g64", (7,)): 2 + 4,
    ("int2:row:zero", (6, 9)): 6 * 3 + 6 * 4 + 6,
    ("int4:g32:dq", (4, 70)): 4 * 35 + 4 * 3 + 4 + 4,
    ("fp8_e4m3:tensor", (5, 257)): 1285 + 4,
    ("fp8_e4m3:b128x128", (130, 300)): 39000 + 2 * 3 * 4,
    ("fp8_e5m2:g64", (2, 65)): 130 + 2 * 2 * 4,
    ("mxfp4", (3, 33)): 3 * 17 + 3 * 2,
    ("nvfp4", (3, 17)): 3 * 9 + 3 * 2 + 4,
    ("nvfp4", (4096, 4096)): 2**23 + 2**20 + 4,
}


@pytest.mark.parametrize(("spelling", "shape", "expected"), [(*key, size) for key, size in BYTES.items()])
def test_bytes_and_bits_per_weight_equal_those_counted_by_hand_and_those_stored(spelling, shape, expected):
    parsed, count = Format.parse(spelling), math.prod(shape)
    assert parsed.nbytes(shape) == expected
    assert parsed.bits_per_weight(shape) == (8 * expected / count if count else 0.0)
    if count <= 2**16:
        stored = quantize(torch.zeros(shape), parsed)
        assert sum(part.numel() * part.element_size() for part in stored.parts().values()) == expected


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [("nf4:g64", 4.5), ("nf4:g64:dq", 4.127), ("mxfp4", 4.25), ("nvfp4", 4.5), ("int4:g128:f16", 4.125)],
)
def test_large_weights_take_the_bits_that_papers_state(spelling, bits):
    assert Format.parse(spelling).bits_per_weight((4096, 4096)) == pytest.approx(bits, abs=1e-3)


def test_matrix_shape_takes_leading_dimensions_for_rows():
    assert [matrix_shape(s) for s in ((), (7,), (2, 3), (2, 3, 4), (0, 4))] == [
        (1, 1), (1, 7), (2, 3), (6, 4), (0, 4),
    ]  # fmt: skip
    assert [packed_length(n, 3) for n in (0, 1, 2, 3, 8, 9)] == [0, 1, 1, 2, 3, 4]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, allow_nan=False, allow_infinity=False))
def test_activations_parse_back_from_their_spelling(threshold):
    activation = Activation(threshold)
    assert Activation.parse(str(activation)) == activation
    scheme = Scheme(Format.parse("int8:row"), activation)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("threshold", "text"), [(0.0, "int8"), (6.0, "int8:t6"), (6.5, "int8:t6.5"), (10.0, "int8:t10")]
)
def test_activations_have_a_short_spelling(threshold, text):
    assert str(Activation(threshold)) == text
    assert Activation.parse(text) == Activation(threshold)


@pytest.mark.parametrize(
    "text", ["fp8", "int8:6", "int8:t", "int8:t-1", "int8:tnan", "int8:t6:t6", "", "int8:t1e999"]
)
def test_a_wrong_activation_says_what_to_write(text):
    with pytest.raises(ValueError, match=r"cannot read the activation .*write 'int8'.*'int8:t6'"):
        Activation.parse(text)


@pytest.mark.parametrize("threshold", [-1.0, math.nan, math.inf])
def test_a_threshold_is_finite_and_at_least_zero(threshold):
    with pytest.raises(ValueError, match="outlier threshold is a number of at least 0"):
        Activation(threshold)


@settings(max_examples=100, deadline=None)
@given(spellings())
def test_a_scheme_without_activation_is_spelled_like_its_format(case):
    scheme = Scheme.parse(case[0])
    assert str(scheme) == case[1]
    assert scheme == Scheme.parse(Format.parse(case[0])) == Scheme(Format.parse(case[1]))
    assert Scheme.parse(scheme) is scheme
    assert (scheme.activation, scheme.compute_dtype, scheme.storage_dtype) == (None, None, "uint8")


def test_llm_int8_is_spelled_in_one_line():
    scheme = Scheme.parse("int8@int8:t6")
    assert scheme == Scheme(Format.parse("int8:row"), Activation(6.0))
    assert str(scheme) == "int8:row@int8:t6"


@pytest.mark.parametrize("weight", ["nf4:g64", "int8:g128", "int8:tensor", "int4:row"])
def test_outliers_need_weights_by_row_and_the_error_says_so(weight):
    mend = f"write int8:row@int8:t6, or {weight} alone"
    with pytest.raises(
        ValueError, match=rf"{weight} cannot be multiplied with activations in int8:t6.*{mend}"
    ):
        Scheme.parse(f"{weight}@int8:t6")


@pytest.mark.parametrize("weight", ["int8:row", "int8:g128", "fp8_e4m3", "dynamic8", "nf4:g64:offset"])
def test_grouped_activations_need_weights_of_few_bits_without_offset(weight):
    with pytest.raises(ValueError, match=rf"{weight}.* cannot be multiplied .*int8:g64"):
        Scheme.parse(f"{weight}@int8:g64")


@pytest.mark.parametrize("activation", ["int8", "int8:g8", "int8:g64", "int8:g128"])
@pytest.mark.parametrize("weight", ["nf4:g64", "nf4:g64:dq", "int4:g128:zero", "int2:g64", "mxfp4:g32"])
def test_weights_of_few_bits_take_grouped_activations(weight, activation):
    scheme = Scheme.parse(f"{weight}@{activation}")
    assert (str(scheme), scheme.is_llm_int8) == (f"{weight}@{activation}", False)
    assert Scheme.parse("int8:row@int8").is_llm_int8


@pytest.mark.parametrize(
    "text", ["int8:g", "int8:g0", "int8:g12", "int8:g64:t6", "int8:g-8", "int8:g8000000000"]
)
def test_activation_groups_are_multiples_of_eight(text):
    with pytest.raises(ValueError, match=r"cannot read the activation .*int8:g64"):
        Activation.parse(text)


def test_groups_and_outliers_exclude_each_other():
    with pytest.raises(ValueError, match="without outlier threshold"):
        Activation(6.0, 64)

"""Codes to bytes and back, against big integers, bit strings and words that other libraries wrote."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.format import Format
from fewbits.packing import bit_order, pack, unpack


def packed_low_first(codes: list[int], bits: int) -> bytes:
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def packed_high_first(codes: list[int], bits: int) -> bytes:
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))


EXPECTED = {"low_first": packed_low_first, "high_first": packed_high_first}


@st.composite
def code_rows(draw):
    bits = draw(st.integers(1, 8))
    rows, count = draw(st.integers(0, 3)), draw(st.integers(0, 41))
    code = st.integers(0, 2**bits - 1)
    matrix = [draw(st.lists(code, min_size=count, max_size=count)) for _ in range(rows)]
    return bits, count, matrix


@settings(max_examples=150, deadline=None)
@given(code_rows(), st.sampled_from(["low_first", "high_first"]))
def test_bytes_are_one_stream_of_bits_per_row_and_unpack_to_the_codes(case, order):
    bits, count, matrix = case
    codes = torch.tensor(matrix, dtype=torch.uint8).reshape(len(matrix), count)
    packed = pack(codes, bits, order)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(matrix), -(-count * bits // 8))
    assert [bytes(row) for row in packed.tolist()] == [EXPECTED[order](row, bits) for row in matrix]
    assert torch.equal(unpack(packed, bits, count, order), codes)


@pytest.mark.parametrize("order", ["low_first", "high_first"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_batches_of_any_rank_pack_like_their_rows(bits, order):
    codes = torch.randint(0, 2**bits, (2, 3, 37), dtype=torch.uint8)
    packed = pack(codes, bits, order)
    assert packed.shape == (2, 3, -(-37 * bits // 8))
    for one, stored in zip(codes.view(6, 37).tolist(), packed.view(6, -1).tolist(), strict=True):
        assert bytes(stored) == EXPECTED[order](one, bits)
    assert torch.equal(unpack(packed, bits, 37, order), codes)


@pytest.mark.parametrize("order", ["low_first", "high_first"])
@pytest.mark.parametrize("bits", range(1, 8))
def test_packing_reads_strided_codes(bits, order):
    codes = torch.randint(0, 2**bits, (19, 4), dtype=torch.uint8).T
    packed = pack(codes, bits, order)
    assert [bytes(row) for row in packed.tolist()] == [EXPECTED[order](row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", range(1, 8))
def test_padding_bits_are_zero(bits):
    full = 2**bits - 1
    for order in EXPECTED:
        (last,) = pack(torch.tensor([full], dtype=torch.uint8), bits, order).tolist()
        assert last == (full if order == "low_first" else full << (8 - bits))


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, list(range(8)), [0x76543210]),
        (3, [i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (5, list(range(32)), [0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB]),
    ],
)
def test_words_equal_those_of_gptq_and_compressed_tensors(bits, codes, words):
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits, "low_first")
    assert bytes(packed.tolist()) == b"".join(word.to_bytes(4, "little") for word in words)


def test_bitsandbytes_keeps_the_first_code_in_the_high_nibble():
    packed = pack(torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8), 4, "high_first")
    assert packed.tolist() == [0x12, 0x34, 0x50]


@pytest.mark.parametrize(
    ("spelling", "order"),
    [
        ("nf4:g64", "high_first"),
        ("fp4:g64:dq", "high_first"),
        ("int4:g128", "low_first"),
        ("int3:row:zero", "low_first"),
        ("mxfp4", "low_first"),
        ("nvfp4", "low_first"),
    ],
)
def test_bitsandbytes_formats_are_high_first_and_all_others_low_first(spelling, order):
    assert bit_order(Format.parse(spelling)) == order

"""`get_memory_footprint()` counts every stored byte, scales included; worked out by hand for Llama-2-7B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import fewbits

# 32 layers of four [4096, 4096] and three [4096, 11008] matrices, two norms; a last norm; embedding and head.
SQUARE, WIDE, TABLE = 4096 * 4096, 4096 * 11008, 32000 * 4096
NORMS = 2 * (2 * 32 + 1) * 4096  # bytes
FULL = 13_476_831_232
BUFFERS = 2 * 64 * 2  # rotary frequencies, and a copy of them, cast with the model


def nf4_dq(count: int) -> int:
    """Half a byte a weight; a byte a group of 64; a float32 per 256 of these; the mean of the scales."""
    groups = count // 64
    return count // 2 + groups + 4 * -(-groups // 256) + 4


def nf4(count: int) -> int:
    return count // 2 + 4 * (count // 64)


@pytest.fixture
def llama_7b() -> Any:
    settings = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).bfloat16()


def test_16_bits(llama_7b: Any) -> None:
    assert 2 * (32 * (4 * SQUARE + 3 * WIDE) + 2 * TABLE) + NORMS == FULL
    assert llama_7b.get_memory_footprint(return_buffers=False) == FULL


OPTIONS = {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
CASES: dict[str, tuple[Any, int, int]] = {
    "nf4_dq": (
        fewbits.BitsAndBytesConfig(**OPTIONS, bnb_4bit_use_double_quant=True),
        32 * (4 * nf4_dq(SQUARE) + 3 * nf4_dq(WIDE)) + 2 * 2 * TABLE + NORMS,
        3_865_592_704,
    ),
    "nf4": (
        fewbits.BitsAndBytesConfig(**OPTIONS),
        32 * (4 * nf4(SQUARE) + 3 * nf4(WIDE)) + 2 * 2 * TABLE + NORMS,
        4_167_573_504,
    ),
    "int8": (
        fewbits.BitsAndBytesConfig(load_in_8bit=True),
        32 * (4 * SQUARE + 3 * WIDE + 4 * (5 * 4096 + 2 * 11008)) + 2 * 2 * TABLE + NORMS,
        7_006_265_344,
    ),
    "nf4_dq_everywhere": (
        fewbits.FewbitsConfig("nf4:g64:dq", modules={"lm_head": "nf4:g64:dq", "embed_tokens": "nf4:g64:dq"}),
        32 * (4 * nf4_dq(SQUARE) + 3 * nf4_dq(WIDE)) + 2 * nf4_dq(TABLE) + NORMS,
        3_476_536_712,
    ),
    "int4_f16_zero": (
        fewbits.FewbitsConfig("int4:g128:f16:zero"),
        32 * (4 * SQUARE + 3 * WIDE) * 133 // 256 + 2 * 2 * TABLE + NORMS,  # 2.5 bytes a group of 128
        3_889_307_648,
    ),
}


@pytest.mark.parametrize(("config", "worked_out", "total"), CASES.values(), ids=CASES)
def test_of_a_quantized_model(config: Any, worked_out: int, total: int, llama_7b: Any) -> None:
    report = fewbits.quantize_model(llama_7b, config)
    assert worked_out == total
    assert llama_7b.get_memory_footprint() == total + BUFFERS
    assert report.nbytes == total
    assert report.bits_per_weight == pytest.approx(8 * total / (FULL / 2))
    assert f"{total / 1e9:.2f} GB" in report.summary


def test_of_quant_storage_is_the_same(llama_7b: Any) -> None:
    config = fewbits.BitsAndBytesConfig(
        **OPTIONS, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="bfloat16"
    )
    fewbits.quantize_model(llama_7b, config)
    assert llama_7b.get_memory_footprint() == 3_865_592_704 + BUFFERS

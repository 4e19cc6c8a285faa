"""Writes the folders in tests/golden/bitsandbytes with the bitsandbytes package itself.

    python tests/golden/make_bitsandbytes.py

Needs bitsandbytes 0.50.2 and transformers 5.23.0 (other versions write other version numbers into
config.json), and for the folders `nf4_transposed` and `nf4_double_after_forward` a CPU with AVX512-BF16;
elsewhere those are left as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_blockwise, has_avx512bf16, int8_vectorwise_dequant
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "bitsandbytes"
# The weight whose decoded values are kept in full; of all, a digest.
SAMPLE = "model.layers.0.self_attn.k_proj"
# name: (options of BitsAndBytesConfig, dtype of the model, layers, intermediate size)
FOLDERS = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, torch.bfloat16, 2, 80),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, torch.float16, 1, 80),
    "nf4_double": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        torch.float32,
        1,
        80,
    ),
    "nf4_bfloat16_storage": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        torch.bfloat16,
        1,
        80,
    ),
    "int8": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, torch.float16, 1, 80),
    "nf4_transposed": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        torch.bfloat16,
        1,
        128,
    ),
    "nf4_double_after_forward": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        torch.bfloat16,
        1,
        128,
    ),
}
# Need AVX512-BF16.
AFTER_FORWARD = ("nf4_transposed", "nf4_double_after_forward")


def plain_model(folder: Path, dtype: torch.dtype, layers: int, intermediate: int) -> None:
    """A Llama with weights like those of trained ones: each row with its own spread, and heavy tails."""
    torch.manual_seed(20)
    wide = intermediate % 64 == 0
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2 if wide else 1,  # the transposed form needs 32 rows or a multiple
        max_position_embeddings=64,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        spread = 0.02 + 0.04 * torch.rand(parameter.shape[0], *[1] * (parameter.dim() - 1))
        tails = torch.distributions.StudentT(5.0).sample(parameter.shape)
        parameter.data = (spread * tails).to(dtype) if parameter.dim() > 1 else parameter.data.to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = (0.1 * torch.randn(parameter.shape)).to(dtype)
    model.save_pretrained(folder)


def decoded(layer: torch.nn.Module) -> torch.Tensor:
    """What bitsandbytes decodes the weight of `layer` to, in float32.

    Its CPU kernel takes wrong scales when rows are no multiple of the block size, and wrong bytes after a
    forward pass, so this is its plain torch implementation; where the kernel can be right, they agree.
    """
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    weight, state = layer.weight, layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = (dequantize_blockwise(absmax, state.state2) + state.offset).float()
    codes = weight.data.view(torch.uint8).reshape(-1)
    result = _dequantize_4bit_compute(codes, absmax, state.code, state.blocksize, state.shape, torch.float32)
    if state.shape[-1] % state.blocksize == 0:
        kernel = torch.ops.bitsandbytes.dequantize_4bit
        assert torch.equal(
            result, kernel(codes, absmax, state.blocksize, state.quant_type, state.shape, torch.float32)
        )
    return result


def run_forward(model: torch.nn.Module) -> None:
    """Brings the scales into the form that a forward pass on an AVX512-BF16 CPU leaves behind."""
    with torch.no_grad():
        model.eval()(torch.arange(4).view(1, 4))
    model.state_dict()  # turns the bytes back into their canonical order, but not the scales
    for layer in quantized(model).values():
        state = layer.weight.quant_state
        if state.nested:
            assert state.state2.dtype == torch.bfloat16
        else:
            assert state.absmax.dtype == torch.bfloat16
            assert state.absmax.shape == (state.shape[1] // state.blocksize, state.shape[0])


def quantized(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def write(name: str) -> None:
    options, dtype, layers, intermediate = FOLDERS[name]
    target = HERE / name
    with tempfile.TemporaryDirectory() as source:
        plain_model(Path(source), dtype, layers, intermediate)
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**options), dtype=dtype, device_map="cpu"
        )
    if name in AFTER_FORWARD:
        run_forward(model)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    (target / "generation_config.json").unlink()
    values = {}
    for path, layer in quantized(model).items():
        if name == "nf4_transposed":
            state = layer.weight.quant_state
            state.absmax = state.absmax.T.reshape(-1).float()
        values[path] = decoded(layer).contiguous()
    save_file({SAMPLE: values[SAMPLE]}, target / "decoded.safetensors")
    digests = {path: hashlib.sha256(value.numpy().tobytes()).hexdigest() for path, value in values.items()}
    (target / "decoded.json").write_text(json.dumps(digests, indent=1) + "\n")


def main() -> None:
    assert (bitsandbytes.__version__, transformers.__version__) == ("0.50.2", "5.23.0")
    assert "fewbits" not in sys.modules
    torch.compiler.set_stance("force_eager")
    for name in FOLDERS:
        if name in AFTER_FORWARD and not has_avx512bf16():
            print(f"{name}: needs a CPU with AVX512-BF16; left as it is")
            continue
        write(name)
        files = sorted((HERE / name).iterdir())
        print(name, {file.name: file.stat().st_size for file in files})


if __name__ == "__main__":
    main()

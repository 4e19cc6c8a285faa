"""Checkpoints travel both ways: what fewbits writes, bitsandbytes reads, and the other way round.

bitsandbytes runs in a process of its own, without fewbits (checkpoint_worker.py), once for all cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fewbits
from fewbits.codebook import CODEBOOKS
from fewbits.nn import QuantLinear

pytestmark = pytest.mark.parity

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "nf4_storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
    # A list of skips replaces the default ones in bitsandbytes, so that it quantizes the head here.
    "nf4_head": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": []},
    "int8_skips": {
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["lm_head", "o_proj", "model.layers.1.mlp"],
    },
}
# How many weights of a model are quantized.
COUNTS = {"llama": 14, "straddling": 14, "borderline": 14, "gpt2": 8, "llama-int8_skips": 9}
# bitsandbytes casts weights to float16 before it makes int8 of them; fewbits does not, so both start there.
DTYPES = {"int8": "float16", "int8_skips": "float16", "nf4_storage": "bfloat16"}
MODELS = ("llama", "straddling", "borderline", "gpt2")
CASES = [
    *(f"llama-{kind}" for kind in OPTIONS),
    *(f"gpt2-{kind}" for kind in list(OPTIONS)[:6]),
    *(f"straddling-{kind}" for kind in ("nf4", "nf4_double", "int8")),
    *(f"borderline-{kind}" for kind in ("nf4", "int8")),
]
# Cases where both quantize the same weights.
SAME = [case for case in CASES if case != "llama-nf4_head"]
# Of rows of 96 weights, bitsandbytes' CPU kernel takes the wrong scales, so its answers say nothing.
ANSWERING = [case for case in CASES if case.startswith(("llama", "gpt2")) or case == "straddling-int8"]
SINGLE = [case for case in SAME if "double" not in case]
DOUBLE = [case for case in CASES if "double" in case]


@pytest.fixture(scope="module", autouse=True)
def _takeover() -> Iterator[None]:
    fewbits.enable(takeover=True)
    yield
    fewbits.enable()


def plain(name: str) -> Any:
    torch.manual_seed(3)
    if name == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes, **drops))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=96 if name == "straddling" else 128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
        )
    )


def spread(model: Any) -> Any:
    """`model` with rows of different sizes and heavy tails, as in trained weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rows = 0.02 + 0.05 * torch.rand(parameter.shape[0], 1)
                parameter.copy_(rows * torch.distributions.StudentT(5.0).sample(parameter.shape))
    return model


def borderline(model: Any) -> Any:
    """`model` with weights that lie, give or take a bit, on the border between two codes."""
    nf4 = torch.tensor(CODEBOOKS["nf4"].thresholds)
    int8 = (torch.arange(-127, 127) + 0.5) / 127
    borders = torch.cat([nf4.repeat(20), int8])
    with torch.no_grad():
        for parameter in spread(model).parameters():
            if parameter.dim() == 2:
                groups = parameter.view(-1, 64)
                absmax = groups.abs().amax(1, keepdim=True)
                bits = 1 + torch.randint(-2, 3, groups.shape) * 2.0**-23
                picked = borders[torch.randint(len(borders), groups.shape)]
                groups.copy_(torch.where(groups.abs() < absmax, absmax * picked * bits, groups))
    return model


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case with what fewbits and bitsandbytes wrote from the same plain model."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        make = borderline if name == "borderline" else spread
        make(plain(name)).save_pretrained(root / name)
    jobs = []
    for case in CASES:
        source, _, kind = case.partition("-")
        dtype = DTYPES.get(kind, "float32")
        jobs.append({"name": case, "source": source, "options": OPTIONS[kind], "dtype": dtype})
        config = BitsAndBytesConfig(**OPTIONS[kind])
        load(root / source, quantization_config=config, dtype=dtype).save_pretrained(root / case / "fewbits")
    (root / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("checkpoint_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(root)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def written(cases: Path, case: str, by: str) -> dict[str, Tensor]:
    return load_file(cases / case / by / "model.safetensors")


def described(cases: Path, case: str, by: str) -> dict[str, Tensor]:
    """What bitsandbytes made of the checkpoint that `by` wrote: decoded weights, logits."""
    error = cases / case / f"{by}.error"
    assert not error.exists(), error.read_text()
    return load_file(cases / case / f"{by}.safetensors")


def layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


def nibbles(codes: Tensor) -> Tensor:
    codes = codes.view(torch.uint8).flatten()
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten()


# --- the same file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAME)
def test_fewbits_writes_the_keys_dtypes_and_shapes_that_bitsandbytes_writes(cases: Path, case: str) -> None:
    ours, theirs = (
        {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in written(cases, case, by).items()}
        for by in ("fewbits", "bitsandbytes")
    )
    # A state is text: its length depends on the digits of the offset.
    states = {key for key in theirs if "quant_state" in key and "double" in case}
    assert sorted(ours) == sorted(theirs)
    assert {k: v for k, v in ours.items() if k not in states} == {
        k: v for k, v in theirs.items() if k not in states
    }


@pytest.mark.parametrize("case", SAME)
def test_fewbits_writes_the_config_that_bitsandbytes_writes(cases: Path, case: str) -> None:
    ours, theirs = (
        json.loads((cases / case / by / "config.json").read_text()) for by in ("fewbits", "bitsandbytes")
    )
    assert ours == theirs


def test_a_skip_list_adds_to_the_default_skips_and_the_file_tells_bitsandbytes_all_of_them(
    cases: Path,
) -> None:
    assert OPTIONS["nf4_head"]["llm_int8_skip_modules"] == []
    config = json.loads((cases / "llama-nf4_head" / "fewbits" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert "lm_head" not in described(cases, "llama-nf4_head", "fewbits")
    assert "lm_head" in described(cases, "llama-nf4_head", "bitsandbytes")


@pytest.mark.parametrize("case", [case for case in SINGLE if "fp4" not in case])
def test_fewbits_writes_the_bytes_that_bitsandbytes_writes(cases: Path, case: str) -> None:
    ours, theirs = written(cases, case, "fewbits"), written(cases, case, "bitsandbytes")
    assert [key for key in theirs if not same_bits(ours[key], theirs[key])] == []


@pytest.mark.parametrize("case", [case for case in CASES if "fp4" in case])
def test_fp4_codes_differ_from_those_of_the_cpu_only_in_the_sign_of_zero(cases: Path, case: str) -> None:
    """bitsandbytes' CPU code cuts the line of signed values, and gives zeros the sign that falls to them; its
    CUDA kernel, which fewbits follows, takes the sign from the value. Both zeros decode to 0."""
    ours, theirs = written(cases, case, "fewbits"), written(cases, case, "bitsandbytes")
    signs = 0
    for key in layers_of(theirs):
        mine, other = nibbles(ours[key]), nibbles(theirs[key])
        differ = mine != other
        assert bool((mine[differ] % 8 == 0).all())
        assert bool((other[differ] % 8 == 0).all())
        signs += int(differ.sum())
        if "double" not in case:
            assert same_bits(ours[f"{key}.absmax"], theirs[f"{key}.absmax"])
    assert signs > 0  # or else the exception above is not needed any more
    states = {key for key in theirs if "quant_state" in key or "absmax" in key}
    rest = set(theirs) - set(layers_of(theirs)) - (states if "double" in case else set())
    assert [key for key in rest if not same_bits(ours[key], theirs[key])] == []


def layers_of(tensors: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(".absmax") for key in tensors if key.endswith("weight.absmax")]


@pytest.mark.parametrize("case", DOUBLE)
def test_double_quantization_differs_only_by_the_coarse_lookup_of_the_cpu(cases: Path, case: str) -> None:
    """bitsandbytes' CPU code finds the 8-bit code of a scale through a table of 65,536 bins, so a scale near
    the middle between two values may get the other one. fewbits takes the nearest, as CUDA does. The mean of
    the scales may differ in its last bits: there it depends on the number of threads."""
    ours, theirs = written(cases, case, "fewbits"), written(cases, case, "bitsandbytes")
    plain_scales = written(cases, case.replace("_double", ""), "fewbits")
    values = torch.tensor(CODEBOOKS["dynamic8"].values)
    for key in layers_of(theirs):
        torch.testing.assert_close(
            ours[f"{key}.nested_absmax"], theirs[f"{key}.nested_absmax"], rtol=2e-6, atol=0
        )
        assert same_bits(ours[f"{key}.nested_quant_map"], theirs[f"{key}.nested_quant_map"])
        state = next(name for name in theirs if name.startswith(f"{key}.quant_state"))
        mine, other = (json.loads(bytes(tensors[state].tolist())) for tensors in (ours, theirs))
        assert mine.pop("nested_offset") == pytest.approx(other.pop("nested_offset"), rel=3e-7)
        assert mine == other
        if "nf4" in case:
            assert same_bits(ours[key], theirs[key])
        scale = plain_scales[f"{key}.absmax"]
        scaled = (scale - scale.mean()) / ours[f"{key}.nested_absmax"].repeat_interleave(256)[: len(scale)]
        mine, other = (values[tensors[f"{key}.absmax"].long()] for tensors in (ours, theirs))
        near, far = (mine - scaled).abs(), (other - scaled).abs()
        assert bool((near <= far + 1e-6).all())
        # A bin is 2 / 65,536 wide, so values at most that far from the middle can go wrong.
        assert float((far - near).max()) <= 2 * 2 / 65_536


# --- read by the other ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["fewbits", "bitsandbytes"])
@pytest.mark.parametrize("case", CASES)
def test_both_decode_the_same_file_to_the_same_bits(cases: Path, case: str, by: str) -> None:
    expected = described(cases, case, by)
    del expected["logits"]
    model = load(cases / case / by)
    weights = {name: layer.quantized_weight() for name, layer in layers(model).items()}
    values = {name: weight.dequantize(torch.float32) for name, weight in weights.items()}
    assert sorted(values) == sorted(expected)
    head = case == "llama-nf4_head" and by == "bitsandbytes"
    assert len(values) == COUNTS.get(case, COUNTS[case.partition("-")[0]]) + head
    assert [name for name in values if not same_bits(values[name], expected[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_bitsandbytes_saved_again_by_fewbits_has_the_same_bytes(
    cases: Path, case: str, tmp_path: Path
) -> None:
    load(cases / case / "bitsandbytes").save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), written(cases, case, "bitsandbytes")
    assert sorted(ours) == sorted(theirs)
    assert [key for key in theirs if not same_bits(ours[key], theirs[key])] == []


@pytest.mark.parametrize("by", ["fewbits", "bitsandbytes"])
@pytest.mark.parametrize("case", ANSWERING)
def test_both_answer_the_same_from_the_same_file(cases: Path, case: str, by: str) -> None:
    expected = described(cases, case, by)["logits"]
    with torch.no_grad():
        logits = load(cases / case / by)(torch.arange(12).view(2, 6)).logits.float()
    error = float((logits - expected).norm() / expected.norm())
    # bfloat16 and float16 models round at every layer, in another order
    assert error < {"nf4_storage": 2e-2, "int8": 1e-2, "int8_skips": 1e-2}.get(case.partition("-")[2], 1e-5)

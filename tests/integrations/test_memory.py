"""Memory while loading: beside the quantized model, little more than the weight at hand."""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from fewbits import model as placing

SOURCE = Path(__file__).resolve().parents[2] / "src"
MB = 10**6

on_linux = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs /proc/<pid>/status to see anonymous memory"
)

# Loads a tiny model first, so that imports and caches do not count; then says when the real load is on.
LOADER = """
import sys, torch, fewbits
fewbits.enable(takeover=True)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
tiny, large, dtype, config = sys.argv[1:]
config = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int4": lambda: fewbits.FewbitsConfig("int4:g128:f16:zero"),
}[config]()
AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype, quantization_config=config)
print("start", flush=True)
model = AutoModelForCausalLM.from_pretrained(large, dtype=dtype, quantization_config=config)
print(model.get_memory_footprint(), flush=True)
sys.stdin.readline()
"""


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's: RssAnon, without the mapped pages of the checkpoint."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no RssAnon in /proc/{pid}/status")


@pytest.fixture(scope="session")
def llama_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, torch.dtype], Path]:
    """llama_of(layers, dtype): a Llama, 1024 wide, with 12.8 million weights a layer."""

    def build(layers: int, dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.mktemp("large")
        settings = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 512,
            "tie_word_embeddings": False,
            "dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(settings))
        shapes = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024)}
        shapes |= {"self_attn.v_proj": (1024, 1024), "self_attn.o_proj": (1024, 1024)}
        shapes |= {"mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816)}
        noise = torch.randn(2816, 1024).to(dtype)
        tensors = {
            "model.embed_tokens.weight": noise[:512].clone(),
            "lm_head.weight": noise[512:1024].clone(),
            "model.norm.weight": torch.ones(1024, dtype=dtype),
        }
        for index in range(layers):
            for name, shape in shapes.items():
                weight = noise[: shape[0]] if shape[1] == 1024 else noise.view(shape)
                tensors[f"model.layers.{index}.{name}.weight"] = weight.clone()
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{index}.{name}.weight"] = torch.ones(1024, dtype=dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return build


@pytest.fixture
def growth_while_loading(checkpoint: Callable[..., Path]) -> Callable[..., tuple[int, int, int]]:
    """(peak, rest, footprint) in bytes: growth of anonymous memory while loading and after, and the model."""

    def measure(path: Path, dtype: str, config: str, **environment: str) -> tuple[int, int, int]:
        child = subprocess.Popen(
            [sys.executable, "-c", LOADER, checkpoint("llama"), path, dtype, config],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline().strip() == "start"
            baseline = anonymous_bytes(child.pid)
            peak = max(sampled_until_output(child))
            footprint = int(child.stdout.readline())
            rest = anonymous_bytes(child.pid) - baseline
            child.communicate("\n")
        return peak - baseline, rest, footprint

    return measure


def sampled_until_output(child: subprocess.Popen[str]) -> Iterator[int]:
    while not select.select([child.stdout], [], [], 0.001)[0]:
        yield anonymous_bytes(child.pid)


LARGEST = 2816 * 1024 * 2  # bytes of one bf16 weight; in float32, as some steps have it, twice that


def full_bytes(layers: int) -> int:
    return 2 * (layers * (4 * 1024 * 1024 + 3 * 2816 * 1024) + 2 * 512 * 1024)


def figures(peak: int, rest: int, footprint: int, full: int) -> str:
    return " ".join(
        f"{name} {size / MB:.0f} MB"
        for name, size in (("peak", peak), ("rest", rest), ("quantized", footprint), ("full", full))
    )


@on_linux
def test_what_lives_is_the_quantized_model_and_a_few_weights(
    llama_of: Callable[[int, torch.dtype], Path],
    growth_while_loading: Callable[..., tuple[int, int, int]],
) -> None:
    """glibc told to give large blocks back at once, so that memory is what is in use."""
    peak, rest, footprint = growth_while_loading(
        llama_of(6, torch.bfloat16), "bfloat16", "nf4", MALLOC_MMAP_THRESHOLD_=str(MB)
    )
    shown = figures(peak, rest, footprint, full_bytes(6))
    assert footprint < 0.28 * full_bytes(6), shown
    assert peak < footprint + 8 * LARGEST + 16 * MB, shown
    assert rest < footprint + 16 * MB, shown
    assert peak > 0.8 * footprint, f"nothing was measured: {shown}"


CASES = {
    "nf4": (24, torch.bfloat16, "nf4", 0.5),
    "int8": (24, torch.bfloat16, "int8", 0.7),
    "int4": (24, torch.bfloat16, "int4", 0.5),
    "nf4_from_float32": (16, torch.float32, "nf4", 0.65),
}


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(("layers", "stored", "config", "share"), CASES.values(), ids=CASES)
def test_memory_taken_from_the_system_stays_far_below_the_full_model(
    layers: int,
    stored: torch.dtype,
    config: str,
    share: float,
    llama_of: Callable[[int, torch.dtype], Path],
    growth_while_loading: Callable[..., tuple[int, int, int]],
) -> None:
    """With the allocator as it comes. `share`: of the bf16 model, which the peak must stay below."""
    path = llama_of(layers, stored)
    peak, rest, footprint = growth_while_loading(path, "bfloat16", config)
    (path / "model.safetensors").unlink()
    shown = figures(peak, rest, footprint, full_bytes(layers))
    assert peak < footprint + 10 * LARGEST + 32 * MB, shown
    assert peak < share * full_bytes(layers), shown
    assert rest < footprint + 16 * MB, shown
    assert peak > 0.8 * footprint, f"nothing was measured: {shown}"


def test_one_weight_at_a_time_is_in_full_precision(
    checkpoint: Callable[..., Path], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a weight is quantized, those before it are gone already, without the garbage collector."""
    given: list[StorageWeakRef] = []
    alive: list[int] = []
    original = placing.fill

    def watched(layer: Any, weight: str, value: torch.Tensor, name: str) -> Any:
        alive.append(sum(not storage.expired() for storage in given))
        given.append(StorageWeakRef(value.untyped_storage()))
        return original(layer, weight, value, name)

    monkeypatch.setattr(placing, "fill", watched)
    gc.disable()
    try:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True)
        load(checkpoint("llama", torch.float32), config, dtype=torch.bfloat16)
    finally:
        gc.enable()
    assert len(alive) == 14
    assert max(alive) <= 1
    assert all(storage.expired() for storage in given)

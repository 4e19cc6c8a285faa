"""Memory while loading: beside the quantized model, little more than the weight at hand, and no file."""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
needs_pagemap = pytest.mark.skipif(
    not Path("/proc/self/pagemap").is_file(), reason="only Linux tells which pages are a file's"
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
    "stored": lambda: None,
}[config]()
options = {"dtype": dtype} if config is None else {"dtype": dtype, "quantization_config": config}
AutoModelForCausalLM.from_pretrained(tiny, **options)
print("start", flush=True)
model = AutoModelForCausalLM.from_pretrained(large, **options)
print(model.get_memory_footprint(), flush=True)
sys.stdin.readline()
"""


def resident(pid: int, *kinds: str) -> int:
    """Bytes of a process that are of these kinds, in the words of /proc/<pid>/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if name.startswith("Rss")
    }
    return sum(sizes[kind] for kind in kinds)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's, so without the mapped pages of the checkpoint."""
    return resident(pid, "RssAnon")


def file_bytes(pid: int) -> int:
    """Pages of files in the memory of a process; of files that lie in memory, too (tmpfs)."""
    return resident(pid, "RssFile", "RssShmem")


@dataclass(frozen=True)
class Growth:
    """What loading adds, in bytes: anonymous memory at its peak and at rest, file pages; and the model."""

    peak: int
    rest: int
    files: int
    footprint: int

    def told(self, full: int) -> str:
        sizes = {"peak": self.peak, "rest": self.rest, "files": self.files, "quantized": self.footprint}
        return " ".join(f"{name} {size / MB:.0f} MB" for name, size in {**sizes, "full": full}.items())


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
def growth_while_loading(checkpoint: Callable[..., Path]) -> Callable[..., Growth]:
    """growth_while_loading(path, dtype, config, **environment), in a process of its own."""

    def measure(path: Path, dtype: str, config: str, **environment: str) -> Growth:
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
            baseline, files = anonymous_bytes(child.pid), file_bytes(child.pid)
            peak = max(sampled_until_output(child))
            footprint = int(child.stdout.readline())
            rest, files = anonymous_bytes(child.pid) - baseline, file_bytes(child.pid) - files
            child.communicate("\n")
        return Growth(peak - baseline, rest, files, footprint)

    return measure


def sampled_until_output(child: subprocess.Popen[str]) -> Iterator[int]:
    while not select.select([child.stdout], [], [], 0.001)[0]:
        yield anonymous_bytes(child.pid)


LARGEST = 2816 * 1024 * 2  # bytes of one bf16 weight; in float32, as some steps have it, twice that


def full_bytes(layers: int) -> int:
    return 2 * (layers * (4 * 1024 * 1024 + 3 * 2816 * 1024) + 2 * 512 * 1024)


@on_linux
def test_what_lives_is_the_quantized_model_and_a_few_weights(
    llama_of: Callable[[int, torch.dtype], Path],
    growth_while_loading: Callable[..., Growth],
) -> None:
    """glibc told to give large blocks back at once, so that memory is what is in use."""
    found = growth_while_loading(
        llama_of(6, torch.bfloat16), "bfloat16", "nf4", MALLOC_MMAP_THRESHOLD_=str(MB)
    )
    shown = found.told(full_bytes(6))
    assert found.footprint < 0.28 * full_bytes(6), shown
    assert found.peak < found.footprint + 8 * LARGEST + 16 * MB, shown
    assert found.rest < found.footprint + 16 * MB, shown
    assert found.peak > 0.8 * found.footprint, f"nothing was measured: {shown}"


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
    growth_while_loading: Callable[..., Growth],
) -> None:
    """With the allocator as it comes. `share`: of the bf16 model, which the peak must stay below."""
    path = llama_of(layers, stored)
    found = growth_while_loading(path, "bfloat16", config)
    (path / "model.safetensors").unlink()
    shown = found.told(full_bytes(layers))
    assert found.peak < found.footprint + 10 * LARGEST + 32 * MB, shown
    assert found.peak < share * full_bytes(layers), shown
    assert found.rest < found.footprint + 16 * MB, shown
    assert found.peak > 0.8 * found.footprint, f"nothing was measured: {shown}"


@needs_pagemap
def test_a_checkpoint_leaves_resident_memory_while_it_is_quantized(
    llama_of: Callable[[int, torch.dtype], Path],
    growth_while_loading: Callable[..., Growth],
) -> None:
    """All of its pages are read, and the file stays mapped for the weights that are kept."""
    found = growth_while_loading(llama_of(4, torch.bfloat16), "bfloat16", "nf4")
    assert found.files < full_bytes(4) / 4, found.told(full_bytes(4))


@needs_pagemap
def test_codes_that_move_to_huge_pages_leave_no_file_pages_behind(
    llama_of: Callable[[int, torch.dtype], Path],
    growth_while_loading: Callable[..., Growth],
    load: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The codes of a layer's MLP are large enough to move, 8.7 MB a layer; all others stay where they are."""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    load(llama_of(4, torch.bfloat16), config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    found = growth_while_loading(tmp_path, "bfloat16", "stored")
    moved = 4 * 3 * LARGEST // 2
    assert found.rest > 0.8 * moved, f"nothing was moved: {found.told(full_bytes(4))}"
    assert found.files < moved / 2, found.told(full_bytes(4))


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

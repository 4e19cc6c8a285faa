"""Random models on disk: Llamas as safetensors and, for llama.cpp, as GGUF."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What LlamaConfig calls them. 1.1B and 7B are the shapes of TinyLlama and Llama 2.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 2, "kv": 1, "vocabulary": 256},
    "100M": {"layers": 8, "hidden": 1024, "intermediate": 2752, "heads": 16, "kv": 16, "vocabulary": 4096},
    "1.1B": {"layers": 22, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv": 4, "vocabulary": 32000},
    "7B": {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv": 32, "vocabulary": 32000},
}
CONTEXT = 2048
POOL = 1 << 26  # distinct random values; every tensor begins at another place in them
SHARD_LAYERS = 4
MARGIN = 2 << 30  # bytes of the disk that stay free


def tensors(size: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(shard, name, shape) of every tensor of a Llama."""
    s = SIZES[size]
    hidden, inner, head = s["hidden"], s["intermediate"], s["hidden"] // s["heads"]
    yield 0, "model.embed_tokens.weight", (s["vocabulary"], hidden)
    for layer in range(s["layers"]):
        shard, start = layer // SHARD_LAYERS, f"model.layers.{layer}"
        yield shard, f"{start}.self_attn.q_proj.weight", (hidden, hidden)
        yield shard, f"{start}.self_attn.k_proj.weight", (s["kv"] * head, hidden)
        yield shard, f"{start}.self_attn.v_proj.weight", (s["kv"] * head, hidden)
        yield shard, f"{start}.self_attn.o_proj.weight", (hidden, hidden)
        yield shard, f"{start}.mlp.gate_proj.weight", (inner, hidden)
        yield shard, f"{start}.mlp.up_proj.weight", (inner, hidden)
        yield shard, f"{start}.mlp.down_proj.weight", (hidden, inner)
        yield shard, f"{start}.input_layernorm.weight", (hidden,)
        yield shard, f"{start}.post_attention_layernorm.weight", (hidden,)
    yield (s["layers"] - 1) // SHARD_LAYERS, "model.norm.weight", (hidden,)
    yield (s["layers"] - 1) // SHARD_LAYERS, "lm_head.weight", (s["vocabulary"], hidden)


def parameters(size: str) -> int:
    return sum(math.prod(shape) for _, _, shape in tensors(size))


def check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes + MARGIN:
        raise SystemExit(
            f"error: {folder} has {free / 1e9:.1f} GB free; the model takes {nbytes / 1e9:.1f} GB and "
            f"{MARGIN / 1e9:.1f} GB should stay free. Set TMPDIR to a larger disk."
        )


class Values:
    """Random normal weights in bfloat16, made once and read from another place for each tensor."""

    def __init__(self, largest: int) -> None:
        import torch

        torch.manual_seed(0)
        self.pool = torch.empty(min(POOL, 2 * largest)).normal_(0, 0.02).bfloat16()
        self.place = 0

    def of(self, shape: tuple[int, ...]) -> Any:
        import torch

        if len(shape) == 1:  # a norm
            return torch.ones(shape, dtype=torch.bfloat16)
        count = math.prod(shape)
        self.place = (self.place + 7919 * 64) % len(self.pool)
        rolled = self.pool[self.place :]
        if len(rolled) < count:
            rolled = torch.cat([rolled, self.pool]).repeat(-(-count // len(self.pool)))
        return rolled[:count].view(shape)


def write_llama(folder: Path, size: str) -> int:
    """Write config and weights, shard by shard; returns the bytes of the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, 2 * parameters(size))
    (folder / "config.json").write_text(json.dumps(llama_config(size), indent=1))
    every = list(tensors(size))
    values = Values(max(math.prod(shape) for _, _, shape in every))
    last = every[-1][0]
    index: dict[str, str] = {}
    total = 0
    for shard in range(last + 1):
        file = f"model-{shard + 1:05}-of-{last + 1:05}.safetensors"
        held = {name: values.of(shape).clone() for one, name, shape in every if one == shard}
        index |= dict.fromkeys(held, file)
        total += sum(tensor.nbytes for tensor in held.values())
        save_file(held, folder / file, metadata={"format": "pt"})
    names = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    return total


def llama_config(size: str) -> dict[str, Any]:
    s = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s["hidden"],
        "intermediate_size": s["intermediate"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"],
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


# How llama.cpp calls them.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    start, _, rest = name.removesuffix(".weight").partition("model.layers.")
    if not rest:
        return f"{GGUF_NAMES[start]}.weight"
    layer, _, inner = rest.partition(".")
    return f"blk.{layer}.{GGUF_NAMES[inner]}.weight"


def write_gguf(file: Path, size: str, kind: str) -> int:
    """The same shapes for llama.cpp, all matrices in `kind` ("q4_0", "iq4_nl"), the output layer too.

    Weights are random again: speed does not depend on them. Runs in the peers' interpreter.
    """
    import gguf
    import numpy as np

    from bench.libraries.with_llama_cpp import GGML, TYPES

    s = SIZES[size]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"])
    writer.add_feed_forward_length(s["intermediate"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(s["hidden"] // s["heads"])
    writer.add_vocab_size(s["vocabulary"])
    writer.add_tokenizer_model("no_vocab")
    stored_as = gguf.GGMLQuantizationType[TYPES[kind]]
    pool = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    done: dict[tuple[int, ...], Any] = {}
    for _, name, shape in tensors(size):
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
            continue
        if shape not in done:
            weight = np.resize(pool, shape)
            packed = np.empty((shape[0], GGML.row_size(int(stored_as), shape[1])), np.uint8)
            GGML.quantize_chunk(
                int(stored_as), weight.ctypes.data, packed.ctypes.data, 0, shape[0], shape[1], None
            )
            done[shape] = packed
        writer.add_tensor(gguf_name(name), done[shape], raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.stat().st_size


def forget_pages(folder: Path) -> None:
    """Ask the system to drop what it caches of these files, so that the next reading is from the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_plainly(folder: Path) -> int:
    """Read all weights into one small buffer; returns the bytes read."""
    buffer, total = bytearray(16 << 20), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total

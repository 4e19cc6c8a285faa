"""`fewbits quantize` of checkpoints that are far larger than the memory it may take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


_CHECKPOINT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file

folder, layers, dtype = Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
hidden, mlp, vocabulary = 2048, 5632, 32000
config = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=mlp,
    num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, vocab_size=vocabulary,
    dtype=sys.argv[3], tie_word_embeddings=False,
)
(folder / "config.json").write_text(json.dumps(config))

def weight(*shape):
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02)

def layer(prefix):
    for name in ("q", "k", "v", "o"):
        yield f"{prefix}.self_attn.{name}_proj.weight", weight(hidden, hidden)
    for name in ("gate", "up"):
        yield f"{prefix}.mlp.{name}_proj.weight", weight(mlp, hidden)
    yield f"{prefix}.mlp.down_proj.weight", weight(hidden, mlp)
    for name in ("input", "post_attention"):
        yield f"{prefix}.{name}_layernorm.weight", torch.ones(hidden, dtype=dtype)

names = {}
norm = {"model.norm.weight": torch.ones(hidden, dtype=dtype)}
files = [lambda: {"model.embed_tokens.weight": weight(vocabulary, hidden), **norm}]
files += [lambda number=number: dict(layer(f"model.layers.{number}")) for number in range(layers)]
files += [lambda: {"lm_head.weight": weight(vocabulary, hidden)}]
for number, make in enumerate(files):
    tensors, file = make(), f"model-{number}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    names |= dict.fromkeys(tensors, file)
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
"""


_MEASURED = """
import sys
import fewbits.cli, fewbits.integrations.streaming
from fewbits.machine import PeakMemory
peak = PeakMemory()
sys.argv = ["fewbits", *sys.argv[1:]]
try:
    fewbits.cli.main()
finally:
    print(peak.bytes_above_start(), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by /proc")
@pytest.mark.parametrize(
    ("layers", "dtype", "options"),
    [(12, "bfloat16", []), (30, "bfloat16", ["--int8"]), (8, "float32", ["--format", "int4:g128:f16:zero"])],
)
def test_memory_is_bounded_by_the_largest_tensor(
    layers: int, dtype: str, options: list[str], tmp_path: Path
) -> None:
    """Checkpoints of 1.5 to 3.4 GB in three times the largest tensor in float32, and 256 MB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2"}
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(
        [sys.executable, "-c", _CHECKPOINT, str(source), str(layers), dtype], env=environment, check=True
    )
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 1.4e9
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, "quantize", str(source), "out", "--json", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.splitlines()[-1])
    result = json.loads(done.stdout)
    print(size, peak, result)
    assert peak <= 3 * 4 * 32000 * 2048 + 256e6
    assert result["bytes"] < 0.65 * size
    shutil.rmtree(tmp_path / "out")

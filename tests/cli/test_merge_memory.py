"""`fewbits merge` into a checkpoint that is larger than the memory it may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, HIDDEN = 16000, 1024  # of the largest tensor

_FILES = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file

folder, vocabulary, hidden = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = transformers.LlamaConfig(
    vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=12,
    num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(folder / "base")
tensors = {}
for name, layer in model.named_modules():
    if isinstance(layer, torch.nn.Linear) and name != "lm_head":
        path = f"base_model.model.{name}"
        tensors[f"{path}.lora_A.weight"] = 0.02 * torch.randn(16, layer.in_features)
        tensors[f"{path}.lora_B.weight"] = 0.02 * torch.randn(layer.out_features, 16)
(folder / "adapter").mkdir()
save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
(folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
"""

_MEASURED = """
import sys
import fewbits.cli, fewbits.integrations.merge_files
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
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_memory_is_bounded_by_the_largest_tensor(base: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2"}
    words = [sys.executable, "-c", _FILES, str(tmp_path), str(VOCABULARY), str(HIDDEN)]
    subprocess.run(words, env=environment, check=True)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    limit = 3 * 4 * VOCABULARY * HIDDEN + 2**27
    assert size > 1.4 * limit
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, "merge", "base", "adapter", "out", "--base", base, "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.splitlines()[-1])
    print(size, peak, json.loads(done.stdout))
    assert peak <= limit

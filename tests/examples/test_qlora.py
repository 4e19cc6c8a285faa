"""The example that fine-tunes the model of this repository, with few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]


def test_the_example_trains_saves_reloads_and_merges(tmp_path: Path) -> None:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "qlora.py", "--out", tmp_path, "--steps", "6"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    losses = result["losses"]
    assert losses["NF4, trained"] < 0.8 * losses["NF4, before"]
    assert losses["NF4, trained"] == pytest.approx(losses["bfloat16, trained"], rel=0.1)
    assert losses["NF4, adapter reloaded"] == pytest.approx(losses["NF4, trained"], rel=1e-3)
    assert losses["merged into bfloat16"] == pytest.approx(losses["NF4, trained"], rel=0.1)
    assert len(result["curves"]["NF4"]) == 6
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config

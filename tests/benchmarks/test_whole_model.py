"""The benchmark of a whole model runs, and writes the models that it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import model_files, model_goals

REPO = Path(__file__).resolve().parent.parent.parent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "whole_model.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPO / "src")},
    )


def test_sizes_have_the_parameters_in_their_names():
    assert model_files.parameters("1.1B") == 1_100_048_384
    assert model_files.parameters("7B") == 6_738_415_616
    assert model_files.parameters("100M") == pytest.approx(1e8, rel=0.2)


def test_a_written_model_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    written = model_files.write_llama(tmp_path, "tiny")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() == model_files.parameters("tiny") == written / 2
    assert all(torch.isfinite(p).all() and p.std() > 0 for p in model.parameters() if p.dim() == 2)
    assert model_files.read_plainly(tmp_path) == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))


def test_every_tensor_has_a_name_in_llama_cpp():
    names = [model_files.gguf_name(name) for _, name, _ in model_files.tensors("tiny")]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output.weight", "blk.1.ffn_down.weight"} <= set(names)


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match="GB free"):
        model_files.check_room(tmp_path, 10**18)


def test_goals_compare_within_rounds():
    ours = [{"tokens_per_second": 40.0, "load_seconds": 4.0, "peak_bytes": 1.2e9}] * 2
    peer = [{"tokens_per_second": 20.0, "load_seconds": 20.0, "peak_bytes": 3.6e9}] * 2
    results = {"figures": {model_goals.OURS: ours, model_goals.BNB: peer}}
    found = {(goal.work, goal.what): (goal, goal.figure(results)) for goal in model_goals.GOALS}
    goal, measured = found["decode, head in 16 bit", "rate of bitsandbytes"]
    assert measured == (2.0, model_goals.BNB)
    assert goal.met(2.0)
    assert found["load NF4+dq", "faster than bitsandbytes"][1] == (5.0, model_goals.BNB)
    assert found["load NF4+dq", "peak memory"][1] == (pytest.approx(1.2), model_goals.OURS)
    assert found["decode, LLM.int8()", "rate of bitsandbytes"][1] is None


@pytest.mark.slow
def test_a_tiny_model_is_measured(tmp_path):
    file = tmp_path / "all.json"
    done = run(
        *("--size", "tiny", "--rounds", 1, "--tokens", 3, "--prefill", 16, "--threads", 1),
        *("--only", "fewbits NF4+dq,llama.cpp Q4_0", "--peers", "/bin/false", "--json", file),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert set(results["figures"]) == {"torch bf16", "fewbits NF4+dq", "fewbits NF4+dq, head too"}
    for entries in results["figures"].values():
        assert entries[0]["tokens_per_second"] > 0
        assert entries[0]["prefill_seconds"] > 0
    assert "llama.cpp q4_0" in results["failed"]
    assert "left out" in done.stdout


@pytest.mark.slow
def test_loading_is_measured_beside_plain_reading(tmp_path):
    done = run("--seven-billion", "--size", "tiny", "--rounds", 1, "--threads", 1, "--peers", "/bin/false")
    assert done.returncode == 0, done.stderr
    assert "plain reading" in done.stdout
    assert "peak memory" in done.stdout

"""The `fewbits` command and its demo, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUANTIZED = ("nf4", "nf4_reloaded", "fp4", "int8")


def fewbits(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NO_COLOR": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "fewbits", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if not (ROOT / "demo" / "model" / "config.json").is_file():
        pytest.skip("the embedded model is not in this checkout")
    done = fewbits("demo", "--json", "--quiet", "--samples", "4", "--tokens", "32")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


@pytest.fixture(scope="module")
def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in report["rows"]}


@pytest.mark.slow
class TestDemo:
    def test_every_variant_has_a_row(self, rows: dict[str, dict[str, Any]]) -> None:
        assert tuple(rows) == ("full", *QUANTIZED)

    def test_the_report_says_what_was_measured(self, report: dict[str, Any]) -> None:
        assert set(report["versions"]) == {"fewbits", "torch", "transformers"}
        assert report["cpu"]
        assert report["threads"] == 1
        assert (report["samples"], report["tokens"], report["seed"]) == (4, 32, 0)
        assert all(row["quality"]["tokens"] == 4 * 31 for row in report["rows"])

    def test_full_precision_equals_itself(self, rows: dict[str, dict[str, Any]]) -> None:
        quality = rows["full"]["quality"]
        assert abs(quality["kl_mean"]) <= 1e-7
        assert quality["same_top_share"] == 1.0
        assert rows["full"]["bits_per_weight"] == pytest.approx(16, abs=0.01)

    def test_a_saved_copy_is_the_same_model(self, rows: dict[str, dict[str, Any]]) -> None:
        first, again = rows["nf4"], rows["nf4_reloaded"]
        assert again["quality"] == first["quality"]
        assert again["text"] == first["text"]
        assert again["weight_bytes"] == first["weight_bytes"]

    @pytest.mark.parametrize("key", QUANTIZED)
    def test_quantized_is_smaller_and_close(self, rows: dict[str, dict[str, Any]], key: str) -> None:
        row, full = rows[key], rows["full"]
        assert row["weight_bytes"] < 0.65 * full["weight_bytes"]
        assert 0 < row["quality"]["kl_mean"] < 0.1
        assert row["quality"]["same_top_share"] > 0.8
        assert row["quality"]["perplexity"] == pytest.approx(full["quality"]["perplexity"], rel=0.1)

    def test_bits_per_weight(self, rows: dict[str, dict[str, Any]]) -> None:
        """A sixth of the weights, the embedding, stays in 16 bits."""
        kept = 2048 * 256 / 3_279_104
        for key, bits in (("nf4", 4.127), ("fp4", 4.5), ("int8", 8.1)):
            expected = 16 * kept + bits * (1 - kept)
            assert rows[key]["bits_per_weight"] == pytest.approx(expected, abs=0.15)

    def test_eight_bits_are_closer_than_four(self, rows: dict[str, dict[str, Any]]) -> None:
        assert rows["int8"]["quality"]["kl_mean"] < rows["nf4"]["quality"]["kl_mean"]

    def test_speed_memory_and_text(self, rows: dict[str, dict[str, Any]]) -> None:
        for row in rows.values():
            assert row["tokens_per_second"] > 0
            assert 0 < row["peak_bytes"] < 1e9
            assert row["text"].startswith("Once upon a time")


def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = fewbits("demo", "--model", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "--model" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    done = fewbits("demo", "--quiet", "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: full precision: ")
    assert done.stderr.count("\n") == 1


def test_too_few_samples_are_refused() -> None:
    done = fewbits("demo", "--samples", "1")
    assert done.returncode == 2
    assert "--samples" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_commands() -> None:
    done = fewbits("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert done.stderr == ""


def test_version() -> None:
    done = fewbits("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("fewbits ")

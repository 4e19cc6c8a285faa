"""The `fewbits` command and its demo, run as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

QUANTIZED = ("nf4", "nf4_reloaded", "fp4", "int8")

Fewbits = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo of `report` writes its page."""
    return tmp_path_factory.mktemp("demo") / "demo.html"


@pytest.fixture(scope="module")
def report(fewbits: Fewbits, demo_model: Path, page: Path) -> dict[str, Any]:
    if not (demo_model / "config.json").is_file():
        pytest.skip("the embedded model is not in this checkout")
    small = ("--samples", "4", "--tokens", "32")
    done = fewbits("demo", "--json", "--quiet", *small, "--html", page)
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

    def test_weight_errors(self, rows: dict[str, dict[str, Any]]) -> None:
        """Those of a saved copy are those of the original, and fewer bits err more."""
        assert rows["full"]["weight_errors"] == {}
        assert rows["nf4_reloaded"]["weight_errors"] == rows["nf4"]["weight_errors"]
        worst = {key: rows[key]["worst_weight"][1] for key in QUANTIZED}
        assert worst["int8"] < 0.02 < 0.08 < worst["nf4"] < worst["fp4"] < 0.15

    def test_the_page(self, report: dict[str, Any], page: Path) -> None:
        text = page.read_text(encoding="utf-8")
        assert report["verdict"].split(" keeps ")[0] in text
        assert text.count("<svg") == 4  # two plots, each wide and narrow
        assert all(row["text"] in text for row in report["rows"])
        assert list(page.parent.iterdir()) == [page]


def test_a_missing_model_is_one_line_and_exit_code_2(fewbits: Fewbits, tmp_path: Path) -> None:
    done = fewbits("demo", "--model", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "--model" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_model_is_one_line_and_exit_code_2(fewbits: Fewbits, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    done = fewbits("demo", "--quiet", "--model", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} has no safetensors file")
    assert done.stderr.count("\n") == 1


def test_a_page_in_no_folder_is_refused_before_measuring(fewbits: Fewbits, tmp_path: Path) -> None:
    done = fewbits("demo", "--html", tmp_path / "nowhere" / "demo.html")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "make it first" in done.stderr


def test_too_few_samples_are_refused(fewbits: Fewbits) -> None:
    done = fewbits("demo", "--samples", "1")
    assert done.returncode == 2
    assert "--samples" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_commands(fewbits: Fewbits) -> None:
    done = fewbits("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert done.stderr == ""


def test_version(fewbits: Fewbits) -> None:
    done = fewbits("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("fewbits ")

"""What the commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from fewbits.cli import _one_line
from fewbits.cli.common import find_model, format_bytes, grouped, parse_bytes, print_json
from fewbits.report import Entry

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("5GB", 5 * 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5 kib", 1536),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1", "1e9", "5GBB", "٣", "9" * 30, "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (3_865_592_704, "3.87 GB"), (2.5e12, "2.50 TB")],
)
def test_sizes_are_shown(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (2, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [2, None]}


@pytest.mark.parametrize(
    "given", ["", "nowhere", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "/nowhere"]
)
def test_what_is_neither_a_folder_nor_an_id_is_not_asked_for(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_model(given)


def test_only_files_that_are_read_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_model("org/model") == tmp_path
    name, patterns = asked
    assert name == "org/model"
    assert not {"*.py", "*.bin", "*"} & set(patterns)  # type: ignore[call-overload]


def test_kept_weights_of_all_layers_are_one_group() -> None:
    entries = [Entry(f"layers.{n}.gate.weight", (2, 2), "bfloat16", 8, False, "why") for n in range(3)]
    entries.append(Entry("embed.weight", (9, 9), "bfloat16", 162, False, "why"))
    assert [(name, len(found)) for name, found in grouped(entries)] == [
        ("embed.weight", 1),
        ("layers.*.gate.weight", 3),
    ]


def test_foreign_names_reach_no_terminal_raw() -> None:
    assert _one_line(ValueError("a\nb \x1b[31mred\x07 é")) == r"a b \x1b[31mred\x07 é"


def test_the_shell_completes_commands() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "_FEWBITS_COMPLETE": "complete_bash",
        "COMP_WORDS": "fewbits in",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fewbits"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["inspect"]


def test_colours_only_where_they_are_wanted(inside: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "\x1b" not in inside("--help").stdout

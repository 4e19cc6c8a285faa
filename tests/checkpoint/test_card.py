"""What a foreign card may put into ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from fewbits.checkpoint.card import inherited, model_card


def facts(text: str, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# Model\n", encoding="utf-8")
    return inherited(tmp_path / "README.md")


def test_licence_and_language_are_inherited(tmp_path: Path) -> None:
    text = "license: apache-2.0\nlanguage: [en, no]\ntags: [x]\nmetrics: [y]\npipeline_tag: text-generation"
    assert facts(text, tmp_path) == {
        "license": "apache-2.0",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize(
    "text",
    [
        "license: {2020-01-01: x}",
        f"license: {'[' * 3000}{']' * 3000}",
        f"license: {'9' * 5000}",
        "datasets: &a [*a]",
        "a: &a [x, x]\nb: &b [*a, *a]\ndatasets: *b",
        'license: "\\ud800"',
        'license: "---\\nbase_model: evil\\n---"',
        "license: !!set {a, b, c}",
        "license: !!python/object/apply:os.system {command: true}",
        "license: \x1b[31mred",
        "license: [unclosed",
        "- a\n- list",
        f"license: {'x' * 300}",
    ],
)
def test_what_is_no_short_text_is_passed_over(text: str, tmp_path: Path) -> None:
    assert facts(text, tmp_path) == {}


def test_no_card_and_no_front_matter(tmp_path: Path) -> None:
    assert inherited(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert inherited(tmp_path / "README.md") == {}


@pytest.mark.parametrize("name", ["plain", "a: b", "x\ny", "--- #", "'\"", "[]{}", "é\u202e"])
def test_any_name_gives_valid_front_matter(name: str) -> None:
    about = {
        "name": name,
        "base_model": name,
        "method": "fewbits",
        "weights": [],
        "parameters": 0,
        "source_bytes": 1,
        "command": "fewbits quantize a b",
        "architecture": "LlamaForCausalLM",
        "versions": {"fewbits": "1"},
    }
    card = model_card(about, {"license": "mit"})
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name
    assert yaml.safe_load(front)["license"] == "mit"
    ast.parse(card.split("```python\n")[1].split("```")[0])

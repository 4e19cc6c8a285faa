"""The documents keep their word: their Python runs, and the commands they name exist."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
WITH_COMMANDS = [*DOCUMENTS, REPO / "CONTRIBUTING.md"]

# Python runs, shells are checked for their commands, the rest is for reading.
SHELLS = {"bash", "console"}
LANGUAGES = {"python", "text", "json", "toml", "yaml", *SHELLS}


def by_name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def fences(path: Path) -> list[Token]:
    tokens = MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
    return [token for token in tokens if token.type == "fence"]


def first_line(fence: Token) -> int:
    assert fence.map
    return fence.map[0] + 2  # 1-based, and past the opening fence


def script_of(path: Path) -> str:
    """The Python of a document as one file in which every line keeps its number."""
    lines: list[str] = []
    for fence in fences(path):
        if fence.info.strip() == "python":
            lines += [""] * (first_line(fence) - 1 - len(lines)) + fence.content.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=by_name)
def test_every_block_says_what_it_is(path):
    odd = [
        f"{by_name(path)}:{first_line(f) - 1} is {f.info!r}; use one of {sorted(LANGUAGES)}"
        for f in fences(path)
        if f.info.strip() not in LANGUAGES
    ]
    assert not odd, "\n".join(odd)


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_python_runs(path, tmp_path):
    """Every block, in order, in one fresh interpreter, in a folder that holds only demo/."""
    script = script_of(path)
    if not script.strip():
        pytest.skip("no Python in it")
    (tmp_path / "demo").symlink_to(REPO / "demo", target_is_directory=True)
    # Not the document's folder on sys.path, but that of the script: keep it apart from what blocks write.
    scripts = tmp_path / ".scripts"
    scripts.mkdir()
    program = scripts / f"{path.stem}_md.py"
    program.write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    output = f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.returncode == 0, f"{by_name(path)}, line numbers as in it:\n{output}"


def commands(path: Path) -> Iterator[tuple[list[str], int]]:
    """(words, line) of every simple command in the shell blocks."""
    for fence in fences(path):
        if (shell := fence.info.strip()) not in SHELLS:
            continue
        text = fence.content.replace("\\\n", "  ")
        for number, line in enumerate(text.splitlines(), first_line(fence)):
            if shell == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            for words in _split(line):
                yield words, number


def _split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)


def make_targets() -> set[str]:
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text, flags=re.MULTILINE))


@cache
def fewbits_help(subcommand: str) -> tuple[int, str]:
    program = "import sys; sys.argv[0] = 'fewbits'; from fewbits.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *filter(None, [subcommand]), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    return done.returncode, done.stdout + done.stderr


def _listed_commands() -> set[str]:
    status, text = fewbits_help("")
    assert status == 0, text
    _, _, listing = text.partition("Commands")
    return set(re.findall(r"^\W*([a-z][a-z0-9-]*)(?=\s{2,}|\W*$)", listing, flags=re.MULTILINE))


def _make_complaints(words: list[str]) -> Iterator[str]:
    for word in words[1:]:
        if not word.startswith("-") and "=" not in word and word not in make_targets():
            yield f"the Makefile has no target {word}"


def _fewbits_complaints(words: list[str]) -> Iterator[str]:
    positional = [word for word in words[1:] if not word.startswith("-")]
    subcommand = positional[0] if positional else ""
    if subcommand and subcommand not in _listed_commands():
        yield f"fewbits --help lists no {subcommand}"
        return
    status, text = fewbits_help(subcommand)
    if status:
        yield f"fewbits {subcommand} --help fails:\n{text}"
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    for word in words[1:]:
        if word.startswith("--") and (option := word.split("=")[0]) not in options:
            yield f"fewbits {subcommand} has no option {option}"


CHECKS = {"make": _make_complaints, "fewbits": _fewbits_complaints}


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=by_name)
def test_named_commands_exist(path):
    complaints = [
        f"{by_name(path)}:{line} {shlex.join(words)}: {complaint}"
        for words, line in commands(path)
        if (check := CHECKS.get(Path(words[0]).name))
        for complaint in check(words)
    ]
    assert not complaints, "\n".join(complaints)

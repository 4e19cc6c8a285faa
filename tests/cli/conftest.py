"""The `fewbits` command as a process, as a user runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from fewbits.cli import app

ROOT = Path(__file__).resolve().parents[2]

Fewbits = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fewbits() -> Fewbits:
    """`fewbits(*arguments, cwd=…, env=…, timeout=…)` runs the command of this checkout to its end.

    Colourless and 100 columns wide; `env` is added to the environment. A process that outlives `timeout`
    seconds is killed and fails the test.
    """

    def run(
        *arguments: str | Path,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout: float = 280,
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NO_COLOR": "1", "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, "-m", "fewbits", *map(str, arguments)],
            cwd=cwd,
            env={**variables, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Fewbits:
    """As `fewbits`, but in this process: without the seconds that an interpreter takes to start."""

    def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        words = [str(argument) for argument in arguments]
        done = CliRunner().invoke(app, words, prog_name="fewbits", env={"NO_COLOR": "1", "COLUMNS": "100"})
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def source(demo_model: Path, tmp_path: Path) -> Path:
    """A copy of the demo model in four files."""
    folder = tmp_path / "source"
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model)
    model.save_pretrained(folder, max_shard_size="2MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_line(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The error of a command that failed as it should."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith(("error: ", "failed: ")))
    return line

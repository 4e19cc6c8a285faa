"""The `fewbits` command as a process, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
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

"""`fewbits quantize`, stopped in the middle of its work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Fewbits, contents, one_line

ROOT = Path(__file__).resolve().parents[2]


_PAUSED = """
import sys
from fewbits.cli import main
from fewbits.integrations import streaming
import time

make = streaming._Work.make
quick = int(sys.argv[1])

def slow(self, tensors):
    global quick
    quick -= 1
    time.sleep(0.02 if quick >= 0 else 2)
    return make(self, tensors)

streaming._Work.make = slow
sys.argv = ["fewbits", *sys.argv[2:]]
main()
"""


def slow_quantize(source: Path, cwd: Path, quick: int, *options: str) -> subprocess.Popen[str]:
    """The command, which takes seconds for each tensor after the first `quick` ones."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            _PAUSED,
            str(quick),
            "quantize",
            str(source),
            "out",
            "--max-shard-size",
            "300kB",
            *options,
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "300"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell have SIGINT ignored, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and len(list(out.glob(".job/*safetensors.json"))) < count:
        time.sleep(0.005)


class TestInterrupted:
    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_it_goes_on(self, sent: signal.Signals, inside: Fewbits, source: Path, tmp_path: Path) -> None:
        for name in ("stopped", "straight"):
            (tmp_path / name).mkdir()
        options = ["--max-shard-size", "300kB", "--quiet"]
        assert inside("quantize", source, "out", *options, cwd=tmp_path / "straight").returncode == 0
        process = slow_quantize(source, tmp_path / "stopped", 25)
        wait_for_shards(tmp_path / "stopped" / "out.partial", 2, process)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), err
        assert not (tmp_path / "stopped" / "out").exists()
        if sent != signal.SIGKILL:
            assert "--resume goes on" in err
            assert "Traceback" not in err
        assert "--resume goes on" in one_line(inside("quantize", source, "out", cwd=tmp_path / "stopped"))
        line = one_line(inside("quantize", source, "out", "--int8", "--resume", cwd=tmp_path / "stopped"))
        assert "belongs to another job" in line
        done = inside("quantize", source, "out", *options, "--resume", cwd=tmp_path / "stopped")
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "stopped" / "out") == contents(tmp_path / "straight" / "out")
        assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["out"]

    def test_before_the_first_shard_nothing_is_left(self, source: Path, tmp_path: Path) -> None:
        process = slow_quantize(source, tmp_path, 3, "--max-shard-size", "5GB")
        while process.poll() is None and not (tmp_path / "out.partial").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "nothing was written" in err
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.slow
    def test_killed_again_and_again(self, inside: Fewbits, source: Path, tmp_path: Path) -> None:
        """At random moments of its work, until it gets through."""
        moments = random.Random(7)
        for name in ("killed", "straight"):
            (tmp_path / name).mkdir()
        options = ["--max-shard-size", "300kB", "--quiet"]
        assert inside("quantize", source, "out", *options, cwd=tmp_path / "straight").returncode == 0
        killed = tmp_path / "killed"
        for _ in range(30):
            for stale in killed.glob("out.partial/.job/*.part"):
                stale.unlink()
            process = slow_quantize(source, killed, 38, "--resume")
            while process.poll() is None and not list(killed.glob("out.partial/.job/*.part")):
                time.sleep(0.005)
            try:
                process.wait(moments.uniform(0, 0.8))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            if (killed / "out").exists():
                break
        assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "straight" / "out")

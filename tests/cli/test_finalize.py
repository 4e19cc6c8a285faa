"""`fewbits finalize`: what workers made, as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import Fewbits, contents, one_line

ROOT = Path(__file__).resolve().parents[2]


class TestReproducible:
    def test_workers_as_processes_give_the_bytes_of_one(
        self, fewbits: Fewbits, inside: Fewbits, source: Path, tmp_path: Path
    ) -> None:
        options = ["--max-shard-size", "500kB", "--quiet"]
        for name in ("one", "three"):
            (tmp_path / name).mkdir()
        done = inside("quantize", source, "out", *options, "--threads", "1", cwd=tmp_path / "one")
        assert done.returncode == 0, done.stderr
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "fewbits", "quantize", str(source), "out", *options, "--worker"]
        workers = [
            subprocess.Popen([*command, f"{number}/3"], cwd=tmp_path / "three", env=environment)
            for number in (1, 2, 3)
        ]
        assert [worker.wait(200) for worker in workers] == [0, 0, 0]
        assert not (tmp_path / "three" / "out").exists()
        done = fewbits("finalize", "out", "--json", cwd=tmp_path / "three")
        assert done.returncode == 0, done.stderr
        assert "README.md" in json.loads(done.stdout)["files"]
        assert contents(tmp_path / "three" / "out") == contents(tmp_path / "one" / "out")
        assert len(list((tmp_path / "one" / "out").glob("*.safetensors"))) > 3

    def test_finalize_before_all_workers_are_done(
        self, inside: Fewbits, source: Path, tmp_path: Path
    ) -> None:
        options = ["--max-shard-size", "500kB"]
        assert inside("quantize", source, "out", *options, "--worker", "2/2", cwd=tmp_path).returncode == 0
        line = one_line(inside("finalize", "out", cwd=tmp_path))
        assert "shards are not finished: model-00001-of-" in line
        line = one_line(inside("finalize", "nowhere", cwd=tmp_path))
        assert "run `fewbits quantize` first" in line

"""The end of a job: what is in the result, and what it replaces."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewbits.checkpoint import finish
from fewbits.checkpoint import work as work_on
from fewbits.checkpoint.safetensors import CheckpointError

from .conftest import COUNT, contents, do, new_job, start


def test_the_result(source: Path, tmp_path: Path) -> None:
    work = new_job(source, tmp_path / "out")
    do(work)
    assert not work.partial.exists()
    expected = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    found: dict[str, Tensor] = {}
    for shard in work.shards:
        found |= load_file(work.out / shard.name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [shard.name for shard in work.shards] == [
        f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)
    ]
    about = json.loads((work.out / "fewbits.json").read_text())
    assert [entry["relative_error"] for entry in about["weights"]] == [0.25] * COUNT
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=work.out, check=False)
    assert done.returncode == 0
    card = (work.out / "README.md").read_text()
    assert "base_model: org/base\nbase_model_relation: quantized" in card
    assert "license: mit" in card


class TestFinish:
    def test_without_a_job(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="run `fewbits quantize` first"):
            finish.finish(tmp_path / "out", overwrite=False)

    def test_a_shard_that_rotted_is_found(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out")
        start(work, join=False)
        work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
        shard = work.partial / work.shards[2].name
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match="not what was written any more"):
            finish.finish(work.out, overwrite=False)
        do(new_job(source, tmp_path / "out"), join=True)  # made again

    def test_an_existing_result_is_replaced_only_on_request(self, source: Path, tmp_path: Path) -> None:
        do(new_job(source, tmp_path / "out"))
        (tmp_path / "out" / "old").write_text("old")
        work = new_job(source, tmp_path / "out")
        start(work, join=False)
        work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
        with pytest.raises(FileExistsError, match="--overwrite replaces it"):
            finish.finish(work.out, overwrite=False)
        finish.finish(work.out, overwrite=True)
        assert not (tmp_path / "out" / "old").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    def test_foreign_files_do_not_get_into_the_result(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out")
        start(work, join=False)
        work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
        (work.partial / ".DS_Store").touch()
        (work.partial / "model.bin").write_text("evil")
        with pytest.raises(FileExistsError, match=r"model\.bin"):
            finish.finish(work.out, overwrite=False)

    @pytest.mark.parametrize("atomic", [True, False])
    def test_replacing_with_and_without_an_exchange(
        self, atomic: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        do(new_job(source, tmp_path / "out"))
        if not atomic:
            monkeypatch.setattr(finish, "exchange", lambda one, other: False)
        work = new_job(source, tmp_path / "out", base_model="org/other")
        start(work, join=False)
        work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
        finish.finish(work.out, overwrite=True)
        assert "org/other" in (work.out / "README.md").read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    def test_a_failing_rename_leaves_the_old_result(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        do(new_job(source, tmp_path / "out"))
        before = contents(tmp_path / "out")
        work = new_job(source, tmp_path / "out")
        start(work, join=False)
        work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if self == work.partial:
                raise OSError(errno.EIO, "no")
            return rename(self, target)

        monkeypatch.setattr(finish, "exchange", lambda one, other: False)
        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no"):
            finish.finish(work.out, overwrite=True)
        assert contents(tmp_path / "out") == before

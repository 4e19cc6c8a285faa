"""Who does a job: one process or several, again after it was stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbits.checkpoint import finish, session
from fewbits.checkpoint import work as work_on
from fewbits.checkpoint.job import Made
from fewbits.checkpoint.safetensors import CheckpointError

from .conftest import COUNT, Stop, contents, do, halved, new_job, start, stopping


class TestResume:
    @pytest.mark.parametrize("after", [0, 1, 4, 7, 11])
    def test_a_stopped_job_goes_on(self, after: int, source: Path, tmp_path: Path) -> None:
        do(new_job(source, tmp_path / "straight" / "out"))
        out = tmp_path / "stopped" / "out"
        out.parent.mkdir()
        work = new_job(source, out, make=stopping(after))
        with pytest.raises(Stop):
            do(work, threads=1)
        assert not out.exists()
        assert not list(work.partial.rglob("*.part"))
        finished = [session.read_record(work.partial, shard.name) is not None for shard in work.shards]
        assert sum(finished) == after // 3
        assert work.partial.exists() == (after >= 3)
        made: list[str] = []

        def noted(tensors: Mapping[str, Tensor]) -> Made:
            made.extend(tensors)
            return halved(tensors)

        do(new_job(source, out, make=noted), join=True)
        assert len(made) == COUNT - 3 * sum(finished)
        assert contents(out) == contents(tmp_path / "straight" / "out")

    def test_without_join_what_is_left_is_not_touched(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out", make=stopping(4))
        with pytest.raises(Stop):
            do(work, threads=1)
        before = contents(work.partial / ".job")
        with pytest.raises(FileExistsError, match="--resume goes on"):
            do(new_job(source, tmp_path / "out"))
        assert contents(work.partial / ".job") == before

    @pytest.mark.parametrize("change", [{"versions": {"fewbits": "2"}}, {"quantization_config": {}}])
    def test_other_arguments_are_refused(self, change: Any, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out", make=stopping(4))
        with pytest.raises(Stop):
            do(work, threads=1)
        with pytest.raises(CheckpointError, match=f"another job: {next(iter(change))} differ"):
            do(new_job(source, tmp_path / "out", **change), join=True)

    def test_a_changed_source_is_refused(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out", make=stopping(4))
        with pytest.raises(Stop):
            do(work, threads=1)
        tensors = load_file(source / "model.safetensors")
        tensors["w00"] += 1
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="has changed since"):
            do(new_job(source, tmp_path / "out"), join=True)

    def test_a_copy_of_the_source_is_as_good(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out", make=stopping(4))
        with pytest.raises(Stop):
            do(work, threads=1)
        os.utime(source / "model.safetensors", (1, 1))
        do(new_job(source, tmp_path / "out"), join=True)

    @pytest.mark.parametrize("damage", ["record", "cut", "gone"])
    def test_a_damaged_shard_is_made_again(self, damage: str, source: Path, tmp_path: Path) -> None:
        do(new_job(source, tmp_path / "straight" / "out"))
        out = tmp_path / "stopped" / "out"
        out.parent.mkdir()
        work = new_job(source, out, make=stopping(4))
        with pytest.raises(Stop):
            do(work, threads=1)
        shard = work.partial / work.shards[0].name
        if damage == "record":
            (work.partial / ".job" / f"{shard.name}.json").write_text("[]")
        elif damage == "cut":
            os.truncate(shard, 100)
        else:
            shard.unlink()
        do(new_job(source, out), join=True)
        assert contents(out) == contents(tmp_path / "straight" / "out")


class TestWorkers:
    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_any_number_gives_the_same_bytes(self, count: int, source: Path, tmp_path: Path) -> None:
        do(new_job(source, tmp_path / "one" / "out"))
        (tmp_path / "many").mkdir()
        for number in reversed(range(count)):
            work = new_job(source, tmp_path / "many" / "out")
            start(work, join=True)
            work_on.run(work, work.shards[number::count], threads=1, memory=1, advance=lambda _: None)
        finish.finish(tmp_path / "many" / "out", overwrite=False)
        assert contents(tmp_path / "many" / "out") == contents(tmp_path / "one" / "out")

    def test_a_missing_worker_is_named(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out")
        start(work, join=True)
        work_on.run(work, work.shards[0::2], threads=1, memory=1, advance=lambda _: None)
        with pytest.raises(CheckpointError, match=r"2 of 4 shards are not finished: model-00002-of-00004"):
            finish.finish(work.out, overwrite=False)

    def test_two_processes_never_write_one_shard(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out")
        start(work, join=True)
        entered, leave = threading.Event(), threading.Event()

        def waiting(tensors: Mapping[str, Tensor]) -> Made:
            entered.set()
            leave.wait(30)
            return halved(tensors)

        slow = new_job(source, tmp_path / "out", make=waiting)
        other = threading.Thread(
            target=work_on.run,
            args=(slow, slow.shards[:1]),
            kwargs={"threads": 1, "memory": 1, "advance": id},
        )
        other.start()
        entered.wait(30)
        try:
            with pytest.raises(
                BlockingIOError, match=r"another process is at model-00001-of-00004\.safetensors"
            ):
                work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
            with pytest.raises(BlockingIOError, match="still writing"):
                session.discard(work.partial)
        finally:
            leave.set()
            other.join()
        assert session.read_record(work.partial, work.shards[0].name) is not None
        session.discard(work.partial)
        assert not work.partial.exists()

    def test_a_worker_that_ends_early_leaves_the_others_their_work(
        self, source: Path, tmp_path: Path
    ) -> None:
        first = new_job(source, tmp_path / "out", make=stopping(0))
        second = new_job(source, tmp_path / "out")
        with session.session(second, "worker-2-of-2", join=True):
            with pytest.raises(Stop), session.session(first, "worker-1-of-2", join=True):
                work_on.run(first, first.shards[0::2], threads=1, memory=1, advance=lambda _: None)
            work_on.run(second, second.shards[1::2], threads=1, memory=1, advance=lambda _: None)
            with pytest.raises(BlockingIOError, match="still writing"):
                session.check_idle(second.partial)
        with session.session(second, "worker-1-of-2", join=True):
            work_on.run(second, second.shards[0::2], threads=1, memory=1, advance=lambda _: None)
        finish.finish(second.out, overwrite=False)

    def test_nobody_starts_while_the_job_is_finished(self, source: Path, tmp_path: Path) -> None:
        work = new_job(source, tmp_path / "out")
        start(work, join=True)
        with session.hold(work.partial, session.FINALIZE), pytest.raises(BlockingIOError):
            start(work, join=True)

    def test_the_slower_of_two_with_other_arguments_is_refused(self, source: Path, tmp_path: Path) -> None:
        one, other = new_job(source, tmp_path / "out"), new_job(source, tmp_path / "out", base_model="b")
        with (
            session.session(one, "worker-1-of-2", join=True),
            pytest.raises(CheckpointError, match="base_model"),
        ):
            start(other, join=True)

"""Jobs: the same bytes whatever happens on the way, and nothing half-made under a final name."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbits.checkpoint import files, finish, job, session
from fewbits.checkpoint import work as work_on
from fewbits.checkpoint.folder import Folder, open_folder
from fewbits.checkpoint.job import Job, Made, Unit
from fewbits.checkpoint.safetensors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
COUNT = 12
SHAPE = (64, 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {f"w{number:02d}": torch.randn(SHAPE) for number in range(COUNT)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def halved(tensors: Mapping[str, Tensor]) -> Made:
    return Made(
        {name: tensor.half() for name, tensor in tensors.items()}, dict.fromkeys(tensors, (1.0, 16.0))
    )


def new_job(source: Path, out: Path, shards: int = 4, **changes: Any) -> Job:
    folder = open_folder(source)
    make = changes.pop("make", halved)
    units = [unit(folder, name, make) for name in folder.files]
    parts = job.split(units, sum(one.nbytes for one in units) // shards)
    identity = {
        "shards": [[shard.name, shard.size] for shard in parts],
        "weights": [
            {
                "name": name,
                "shape": list(SHAPE),
                "count": 2048,
                "stored": "float16",
                "quantized": True,
                "reason": "",
                "nbytes": 4096,
            }
            for name in folder.files
        ],
        "parameters": 2048 * COUNT,
        "card": {"license": "mit"},
        "carried": {},
        "source_bytes": 8192 * COUNT,
        "base_model": "org/base",
        "name": out.name,
        "method": "fewbits",
        "command": "fewbits quantize a b",
        "architecture": "LlamaForCausalLM",
        "versions": {"fewbits": "1"},
        **changes,
    }
    return Job(folder, out, parts, identity, {"config.json": "{}\n"}, {})


def unit(folder: Folder, name: str, make: Any) -> Unit:
    return Unit((name,), {name: ("F16", folder.info(name).shape)}, make, 2**14)


def do(work: Job, *, join: bool = False, threads: int = 2, memory: int = 2**16) -> None:
    with session.session(work, "all", join=join):
        work_on.run(work, work.shards, threads=threads, memory=memory, advance=lambda _: None)
        finish.finish(work.out, overwrite=False)


def start(work: Job, *, join: bool) -> None:
    with session.session(work, "all", join=join):
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1, 2**20])
def test_the_bytes_depend_on_neither_threads_nor_memory(
    threads: int, memory: int, source: Path, tmp_path: Path
) -> None:
    do(new_job(source, tmp_path / "one" / "out"), threads=2, memory=2**15)
    do(new_job(source, tmp_path / "two" / "out"), threads=threads, memory=memory)
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")


def test_units_at_work_stay_within_the_memory(source: Path, tmp_path: Path) -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def counting(tensors: Mapping[str, Tensor]) -> Made:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01)
        with lock:
            at_work -= 1
        return halved(tensors)

    do(new_job(source, tmp_path / "out", make=counting), threads=8, memory=3 * 2**14)
    assert 2 <= most <= 3


class TestSplit:
    def test_a_unit_is_never_divided(self) -> None:
        big = Unit(("a",), {"a": ("F32", (100,)), "a_scale": ("F32", (1,))}, halved, 1)
        shards = job.split([big, big, big], 1)
        assert [len(shard.units) for shard in shards] == [1, 1, 1]

    def test_one_shard_has_the_plain_name(self) -> None:
        (shard,) = job.split([Unit(("a",), {"a": ("U8", (3,))}, halved, 1)], 10)
        assert shard.name == "model.safetensors"


class TestOpenLengths:
    """Text whose length is known only when it is made."""

    @pytest.mark.parametrize("length", [0, 1, 17, 40])
    def test_any_length_gives_a_valid_file(self, length: int, source: Path, tmp_path: Path) -> None:
        def make(tensors: Mapping[str, Tensor]) -> Made:
            text = torch.full((length,), 7, dtype=torch.uint8)
            return Made({"w00": tensors["w00"], "w00.text": text, "w00.tail": torch.ones(3)})

        folder = open_folder(source)
        outputs = {"w00": ("F32", SHAPE), "w00.text": ("U8", (40,)), "w00.tail": ("F32", (3,))}
        shards = job.split([Unit(("w00",), outputs, make, 1, frozenset({"w00.text"}))], 10**9)
        base = new_job(source, tmp_path / "out")
        work = Job(folder, base.out, shards, {**base.identity, "shards": [["model.safetensors", 0]]}, {}, {})
        do(work)
        found = load_file(work.out / "model.safetensors")
        assert found["w00.text"].tolist() == [7] * length
        assert found["w00.tail"].tolist() == [1, 1, 1]
        assert torch.equal(found["w00"], load_file(source / "model.safetensors")["w00"])

    def test_more_than_announced_is_refused(self, source: Path, tmp_path: Path) -> None:
        def make(tensors: Mapping[str, Tensor]) -> Made:
            return Made({"w00": torch.zeros(41, dtype=torch.uint8)})

        shards = job.split([Unit(("w00",), {"w00": ("U8", (40,))}, make, 1, frozenset({"w00"}))], 10**9)
        base = new_job(source, tmp_path / "out")
        work = Job(base.source, base.out, shards, base.identity, {}, {})
        with pytest.raises(ValueError, match="became"):
            do(work)


@pytest.mark.parametrize(
    "made",
    [
        {"w03": torch.zeros(SHAPE)},
        {"w03": torch.zeros(2, dtype=torch.float16)},
        {"other": torch.zeros(SHAPE, dtype=torch.float16)},
        {},
    ],
)
def test_what_was_not_announced_is_refused(made: dict[str, Tensor], source: Path, tmp_path: Path) -> None:
    def wrong(tensors: Mapping[str, Tensor]) -> Made:
        return Made(made) if "w03" in tensors else halved(tensors)

    work = new_job(source, tmp_path / "out", make=wrong)
    with pytest.raises(ValueError, match="w03 became"):
        do(work)
    assert not work.out.exists()
    assert not list(work.partial.rglob("*.part"))


class Stop(Exception):  # noqa: N818
    """Raised in the middle of the work."""


def stopping(after: int) -> Any:
    lock, calls = threading.Lock(), 0

    def make(tensors: Mapping[str, Tensor]) -> Made:
        nonlocal calls
        with lock:
            calls += 1
            if calls > after:
                raise Stop
        return halved(tensors)

    return make


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
            with pytest.raises(BlockingIOError, match="another process is writing model-00001-of-00004"):
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

    def test_exchange(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        if not files.exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this system cannot exchange two names")
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
        assert not files.exchange(tmp_path / "a", tmp_path / "nowhere")

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


@pytest.fixture(params=[72, 88])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of that many kB: too small for all shards, or for what goes beside them."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "fewbits-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs more rights than these")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class TestFullDisk:
    def test_nothing_half_made_is_left_and_it_goes_on(
        self, source: Path, small_disk: Path, tmp_path: Path
    ) -> None:
        work = new_job(source, small_disk / "out")
        with pytest.raises(OSError, match="No space left") as caught:
            do(work, threads=1)
        assert caught.value.errno == errno.ENOSPC
        assert not work.out.exists()
        assert not list(work.partial.rglob("*.part"))
        finished = [session.read_record(work.partial, shard.name) is not None for shard in work.shards]
        assert any(finished)
        subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
        do(new_job(source, small_disk / "out"), join=True)
        do(new_job(source, tmp_path / "straight" / "out"))
        assert contents(small_disk / "out") == contents(tmp_path / "straight" / "out")


_KILLED = """
import sys, time, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_job as t
from fewbits.checkpoint import finish, session
from fewbits.checkpoint import work as work_on

def slow(tensors):
    time.sleep(0.02)
    return t.halved(tensors)

work = t.new_job(Path(sys.argv[3]), Path(sys.argv[4]), make=slow)
with session.session(work, "all", join=True):
    print("started", flush=True)
    work_on.run(work, work.shards, threads=2, memory=2**16, advance=lambda _: None)
    finish.finish(work.out, overwrite=False)
"""


@pytest.mark.parametrize("moment", [0.0, 0.03, 0.08, 0.12])
def test_killed_at_some_moment_it_goes_on(moment: float, source: Path, tmp_path: Path) -> None:
    """kill -9, several times over, until it gets through; then the bytes are those of an undisturbed run."""
    do(new_job(source, tmp_path / "straight" / "out"))
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    places = [str(ROOT / "src"), str(Path(__file__).parent), str(source), str(out)]
    command = [sys.executable, "-c", _KILLED, *places]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (-signal.SIGKILL, 0)
    if not out.exists():
        do(new_job(source, out), join=True)
    assert contents(out) == contents(tmp_path / "straight" / "out")
    assert not job.partial_folder(out).exists()


class TestFiles:
    def test_a_failed_write_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def failing(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="full"):
            files.write_atomically(path, b"new")
        assert contents(tmp_path) == {"file": b"old"}

    def test_a_link_is_replaced_and_not_written_through(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("precious")
        (tmp_path / "link").symlink_to(target)
        files.write_atomically(tmp_path / "link", b"new")
        assert target.read_text() == "precious"
        assert (tmp_path / "link").read_text() == "new"
        assert not (tmp_path / "link").is_symlink()

    def test_a_planted_link_is_not_written_through(self, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("precious")
        work = new_job(source, tmp_path / "out")
        start(work, join=False)
        (work.partial / ".job" / f"{work.shards[0].name}.part").symlink_to(target)
        with pytest.raises(OSError, match="symbolic links"):
            work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
        assert target.read_text() == "precious"

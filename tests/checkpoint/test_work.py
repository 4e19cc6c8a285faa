"""The work of a job: the same bytes whatever happens on the way, and nothing half-made under a final name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewbits.checkpoint import job, session
from fewbits.checkpoint import work as work_on
from fewbits.checkpoint.folder import open_folder
from fewbits.checkpoint.job import Job, Made, Unit

from .conftest import SHAPE, contents, do, halved, new_job, start

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_planted_link_is_not_written_through(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    work = new_job(source, tmp_path / "out")
    start(work, join=False)
    (work.partial / ".job" / f"{work.shards[0].name}.part").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        work_on.run(work, work.shards, threads=1, memory=1, advance=lambda _: None)
    assert target.read_text() == "precious"


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
import conftest as t
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

"""The parent's side of the workers: start them, ask them, outlive them."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Results of a few megabytes come from the heap again and again; otherwise the C library maps and unmaps
# them at each call, and page faults are what is measured. The same for everyone.
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PATIENCE = 600.0  # seconds for one answer
OWN_LIBRARIES = ("fewbits", "torch", "machine")  # run by this interpreter; others by the peers'


class LostError(Exception):
    """A worker died or went silent; the text says what is known."""


class Worker:
    """One library in one process, with a number of threads."""

    def __init__(self, process: str, threads: int, peers: str, log: Path) -> None:
        library, *settings = process.split()
        python = sys.executable if library in OWN_LIBRARIES else peers
        environment = {name: str(threads) for name in THREAD_VARIABLES} | MEMORY
        environment |= dict(setting.split("=", 1) for setting in settings)
        self.name, self.log = process, log
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | environment,
        )
        self._waiter = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._waiter.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command. LostError when there is none."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
            line = stdout.readline() if self._waiter.select(PATIENCE) else b""
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._process.poll()
            self.stop()
            raise LostError(f"its process ended{'' if code is None else f' ({code})'}: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-200:] if lines else "it said nothing"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Crew:
    """The workers of one number of threads. Those that cannot start or die are left out, with the reason."""

    def __init__(self, processes: Iterable[str], threads: int, peers: str, scratch: Path) -> None:
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        for process in dict.fromkeys(processes):
            log = scratch / f"{process.replace(' ', '_')}-{threads}.log"
            try:
                worker = Worker(process, threads, peers, log)
                self.workers[process] = worker
            except OSError as problem:
                self.lost[process] = str(problem)
        for process in list(self.workers):
            self.versions |= self.ask(process, "versions") or {}

    def ask(self, process: str, do: str, **arguments: Any) -> dict[str, Any] | None:
        """The answer, or None where the worker is gone or refuses; `lost` then says why."""
        worker = self.workers.get(process)
        if worker is None:
            return None
        try:
            return worker.ask(do, **arguments)
        except LostError as reason:
            self.lost[process] = str(reason)
            del self.workers[process]
            return None

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()
        self.workers.clear()


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

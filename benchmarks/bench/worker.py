"""The process of one library: takes commands as lines of JSON, answers each with one line.

    {"do": "versions"}
    {"do": "prepare", "key": …, "task": {…}, "probe": x.npy, "product": xW.npy}   errors of the product
    {"do": "time", "key": …, "input": x.npy, "budget": ns, "least": calls}         nanoseconds of each call
    {"do": "forget", "key": …}

Between commands it sleeps, and it answers only when all threads of the process do: spinning threads of a
library would take time from the next contender.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def find_bench() -> None:
    """Make `bench` importable without benchmarks/ on the path: libraries would find kernels.py there."""
    here = Path(__file__).resolve().parent
    sys.path.pop(0)  # this folder
    spec = importlib.util.spec_from_file_location("bench", here / "__init__.py")
    assert spec is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)


find_bench()

import numpy as np  # noqa: E402

from bench.libraries import RefusedError, Task, Work  # noqa: E402

WARM_UP = 4e6  # nanoseconds of calls before those that count: threads and cores wake up
LONGEST = 6  # budgets that a slice of very long calls may take
PATIENCE = 0.5  # seconds that a library's threads may go on spinning after the last call
ERROR_ROWS = 8  # rows of x, at most, that errors are measured with


class Worker:
    def __init__(self, library: str) -> None:
        self.library = importlib.import_module(f"bench.libraries.with_{library}")
        self.works: dict[str, Work] = {}
        self.turn: dict[str, int] = {}

    def versions(self) -> dict[str, str]:
        return dict(self.library.versions())

    def prepare(self, key: str, task: dict[str, Any], probe: str = "", product: str = "") -> dict[str, Any]:
        try:
            work = self.works[key] = self.library.prepare(Task(**task))
        except RefusedError as reason:
            return {"refused": str(reason)}
        self.turn[key] = 0
        answer: dict[str, Any] = {"nbytes": work.nbytes, "copies": work.copies, "note": work.note}
        if probe and work.output is not None:
            x = np.load(probe)[:ERROR_ROWS]
            work.set_input(x)
            answer |= errors(work, x, np.load(product)[:ERROR_ROWS])
        return answer

    def time(self, key: str, budget: float, least: int, input: str = "") -> dict[str, Any]:
        work, turn = self.works[key], self.turn[key]
        if input:
            work.set_input(np.load(input))
        gc.collect()
        gc.disable()
        taken: list[int] = []
        run, clock, copies = work.run, time.perf_counter_ns, work.copies
        warm_until = clock() + WARM_UP
        until = None
        while until is None or clock() < until or (len(taken) < least and sum(taken) < LONGEST * budget):
            start = clock()
            answer = run(turn % copies)
            took = answer if work.timed else clock() - start
            turn += 1
            if until is not None:
                taken.append(took)
            elif clock() >= warm_until:
                until = clock() + budget
        gc.enable()
        self.turn[key] = turn
        return {"ns": taken, "restless": not asleep()}

    def forget(self, key: str) -> dict[str, Any]:
        self.works.pop(key, None)
        gc.collect()
        return {}


def errors(work: Work, x: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """‖y − y'‖ / ‖y'‖: of the whole, against x·Wᵀ; of the product alone, against x·decodedᵀ."""
    assert work.output is not None
    y = work.output().astype(np.float64)
    found = {"total_error": distance(y, exact)}
    if work.decoded is not None:
        decoded = work.decoded()
        parts = [x.astype(np.float64) @ piece.astype(np.float64).T for piece in np.array_split(decoded, 16)]
        found["product_error"] = distance(y, np.concatenate(parts, 1))
    return found


def distance(y: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(y - wanted)) / max(float(np.linalg.norm(wanted)), 1e-300)


def asleep() -> bool:
    """Wait until no thread of this process computes; whether that came within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        before = time.process_time_ns()
        time.sleep(0.002)
        if time.process_time_ns() - before < 400_000:
            return True
    return False


def main() -> None:
    # Libraries print: their output goes where errors go, so that answers stay alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as problem:
            answer = {"refused": f"{type(problem).__name__}: {problem}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""Measures one plan after the other: prepares every contender, then goes round after round through all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.contenders import ROOFS, Contender
from bench.crew import Crew, progress
from bench.libraries import Task

OUTLIER_COLUMNS = 6
CACHES = 4  # the copies of a weight take so many times the last-level cache
FEWEST_ROUNDS = 3
LEAST = 3  # calls in a slice, if they are not very long


@dataclass(frozen=True)
class Plan:
    """One part of a run: a kind of work on weights of one shape, for these numbers of rows and threads."""

    work: str
    shape: tuple[int, int]
    rows: tuple[int, ...]
    threads: int

    @property
    def cost(self) -> float:
        """About how much work a round is, to share out time."""
        rows, columns = self.shape
        return rows * columns * sum(max(m, 32) if m else 200 for m in self.rows) / self.threads

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.work} {self.shape[0]}×{self.shape[1]}, {threads}"


class Session:
    """A run: its contenders, its worker processes, the files they read."""

    def __init__(
        self,
        contenders: list[Contender],
        scratch: Path,
        peers: str,
        rounds: int,
        budget: float,
        rotation: int | None = None,
    ) -> None:
        self.contenders, self.scratch, self.peers = contenders, scratch, peers
        self.rounds, self.budget, self.cache = rounds, budget, last_level_cache()
        self.rotation = CACHES * self.cache if rotation is None else rotation
        self.versions: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self._crew: Crew | None = None
        self._threads = 0

    def stop(self) -> None:
        if self._crew is not None:
            self._crew.stop()
            self.versions |= self._crew.versions
            self.lost |= self._crew.lost
        self._crew = None

    def _crew_of(self, threads: int) -> Crew:
        if self._crew is None or self._threads != threads:
            self.stop()
            processes = ["machine", *(one.process for one in self.contenders)]
            self._crew, self._threads = Crew(processes, threads, self.peers, self.scratch), threads
        return self._crew

    def measure(self, plan: Plan, seconds: float = math.inf) -> dict[str, Any]:
        """All figures of one part: what was stored, and the median time of every slice.

        Rounds end when one more would take the part past `seconds`, but not before `FEWEST_ROUNDS`.
        """
        started = time.monotonic()
        crew = self._crew_of(plan.threads)
        files = write_inputs(plan, self.scratch)
        here = {f"c{i}": one for i, one in enumerate(self.contenders) if one.work == plan.work}
        described = {key: self._prepare(crew, key, one, plan, files) for key, one in here.items()}
        roofs = {f"roof {name}": name for name in ROOFS}
        sizes = {key: self._prepare_roof(crew, key, name, plan) for key, name in roofs.items()}
        running = [key for key in here if "refused" not in described[key]]
        slices: dict[str, dict[str, list[list[float]]]] = {key: {} for key in [*here, *roofs]}
        known_roofs = [key for key, size in sizes.items() if size]
        done = 0
        while done < self.rounds:
            begun = time.monotonic()
            self._round(crew, plan, files, done, known_roofs, running, slices)
            done += 1
            now = time.monotonic()
            progress(f"  round {done} of at most {self.rounds}, {now - begun:.0f} s")
            if done >= FEWEST_ROUNDS and now + (now - begun) > started + seconds:
                break
        for key, one in here.items():
            if one.process in crew.lost:
                described[key]["refused"] = crew.lost[one.process]
            crew.ask(one.process, "forget", key=key)
        return {
            "work": plan.work,
            "shape": plan.shape,
            "rows": plan.rows,
            "threads": plan.threads,
            "rounds": done,
            "contenders": [described[key] for key in here],
            "median": self._figures(here, roofs, sizes, slices, done, statistics.median),
            "best": self._figures(here, roofs, sizes, slices, done, min),
        }

    @staticmethod
    def _figures(
        here: dict[str, Contender],
        roofs: dict[str, str],
        sizes: dict[str, int],
        slices: dict[str, dict[str, list[list[float]]]],
        done: int,
        of: Callable[[list[float]], float],
    ) -> dict[str, Any]:
        """Every slice as one number: {"ns": label → M → rounds, "roofs": name → M → rounds, per ns}."""
        return {
            "ns": {
                one.label: {
                    m: [of(ns) for ns in taken] for m, taken in slices[key].items() if len(taken) == done
                }
                for key, one in here.items()
            },
            "roofs": {
                name: {m: [sizes[key] / of(ns) for ns in taken] for m, taken in slices[key].items()}
                for key, name in roofs.items()
            },
        }

    def _round(
        self,
        crew: Crew,
        plan: Plan,
        files: dict[tuple[str, int], str],
        number: int,
        roofs: list[str],
        running: list[str],
        slices: dict[str, dict[str, list[list[float]]]],
    ) -> None:
        """For every number of rows one slice of all, beginning with another contender each time."""
        first = number % max(len(running), 1)
        for m in plan.rows:
            for key in [*roofs, *running[first:], *running[:first]]:
                one = self.contenders[int(key[1:])] if key in running else None
                source = "" if one is None or not m else files["outliers" if one.outliers else "x", m]
                taken = self._slice(crew, key, one, source)
                if taken:
                    slices[key].setdefault(str(m), []).append(taken)

    def _prepare(
        self, crew: Crew, key: str, one: Contender, plan: Plan, files: dict[tuple[str, int], str]
    ) -> dict[str, Any]:
        task = Task(one.variant, plan.work, one.x, files["weight", 0], self.rotation, plan.threads)
        kind = "outliers" if one.outliers else "x"
        probe = (
            {"probe": files[kind, 0], "product": files[f"{kind} product", 0]} if plan.work == "linear" else {}
        )
        answer = crew.ask(one.process, "prepare", key=key, task=asdict(task), **probe)
        if answer is None:
            answer = {"refused": crew.lost.get(one.process, "its process is gone")}
        if "refused" in answer:
            progress(f"  {one.label}: {answer['refused']}")
        about = {name: getattr(one, name) for name in ("label", "arithmetic", "library")}
        return about | answer

    def _prepare_roof(self, crew: Crew, key: str, name: str, plan: Plan) -> int:
        task = Task(name, "roof", "", "", self.rotation, plan.threads)
        answer = crew.ask("machine", "prepare", key=key, task=asdict(task))
        return int(answer["nbytes"]) if answer and "nbytes" in answer else 0

    def _slice(self, crew: Crew, key: str, one: Contender | None, source: str) -> list[float]:
        """Nanoseconds of the calls of one slice; empty when there is nobody to ask."""
        process = "machine" if one is None else one.process
        answer = crew.ask(process, "time", key=key, budget=self.budget, least=LEAST, input=source)
        if not answer or "ns" not in answer:
            if answer and one is not None:
                crew.lost[f"{process}, {one.label}"] = answer.get("refused", "")
            return []
        taken: list[float] = answer["ns"]
        return taken


def write_inputs(plan: Plan, scratch: Path) -> dict[tuple[str, int], str]:
    """Files of a weight, of inputs for each number of rows, and (0 rows) of a probe and its exact products.

    Weight and inputs are random normal, the same at each run; values are rounded to bfloat16, so that all
    dtypes hold them.
    """
    generator = np.random.default_rng(0)
    columns = plan.shape[1]
    weight = rounded(generator.standard_normal(plan.shape, dtype=np.float32) * np.float32(0.02))
    files = {("weight", 0): save(scratch / "weight.npy", weight)}
    if plan.work != "linear":
        return files
    outliers = generator.choice(columns, min(OUTLIER_COLUMNS, columns), replace=False)
    for m in (0, *plan.rows):
        x = rounded(generator.standard_normal((m or 8, columns), dtype=np.float32))
        large = x.copy()
        large[:, outliers] = rounded(np.float32(8) + 4 * np.abs(x[:, outliers]))
        for kind, values in (("x", x), ("outliers", large)):
            files[kind, m] = save(scratch / f"{kind}-{m}.npy", values)
            if not m:
                exact = values.astype(np.float64) @ weight.astype(np.float64).T
                files[f"{kind} product", 0] = save(scratch / f"{kind}-product.npy", exact)
    return files


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def save(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


def last_level_cache() -> int:
    """Bytes of the largest cache that core 0 reads through; 32 MiB where the system does not say."""
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (index / "size").read_text().strip() if (index / "size").is_file() else ""
        units = {"K": 1 << 10, "M": 1 << 20}
        if text and text[-1] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)

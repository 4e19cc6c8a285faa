"""fewbits' kernels beside those of its peers, in one run: `make bench`.

How it is fair. Every library has a process of its own, with OMP_NUM_THREADS set and nothing else told about
threads but their number. Rounds interleave all contenders: one slice of A, one of B, one of C, …, then again,
so that a slow minute of the machine hits all of them; before a slice counts, a few milliseconds of calls wake
threads and cores, and after it the process waits until all its threads sleep. Compared are medians of ratios
within a round, and ratios to what the machine itself could do in the same rounds (bench/machine.c).

Every contender has several copies of its stored weight, together several times the last-level cache, and
takes them in turn: no weight is in a cache when its turn comes. Activations are random normal, prepared in
the dtype that the contender takes. Layers and functions of peers are those that their users call;
conversions of inputs, repacking and compilation are done before.

`--minutes` are shared out over the parts of a run by their work. A part stops early when its share is used
up, but never before three rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import goals, picture, tables
from bench.contenders import CONTENDERS, ROOFS, Contender
from bench.crew import progress
from bench.session import Plan, Session

from fewbits.machine import cpu_name, usable_cores

HERE = Path(__file__).resolve().parent
Shape = tuple[int, int]

WIDE: tuple[Shape, ...] = ((4096, 4096),)
DEFAULT_SHAPES: tuple[Shape, ...] = ((4096, 4096), (4096, 11008))
ALL_SHAPES: tuple[Shape, ...] = (
    (4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (1024, 1024),
    (4304, 4096), (4096, 4304), (1000, 4100),
)  # fmt: skip
ALL_ROWS = (1, 2, 4, 8, 16, 64, 256, 512)


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the temporary folder would stay
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as scratch:
        results = run(options, Path(scratch))
    results.setdefault("wall_seconds", time.perf_counter() - started)
    report(results, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--full", action="store_true", help="all shapes, contenders and numbers of rows (about an hour)")
    add("--quick", action="store_true", help="one tiny shape, two rounds: shows that everything runs")
    add("--shapes", type=shapes, help="N x K of the weights, as in 4096x4096,4096x11008")
    add("--rows", type=numbers, help=f"rows of the activations ({','.join(map(str, ALL_ROWS))})")
    add("--threads", type=numbers, help="numbers of threads, as in 2,1 (all cores, then 1)")
    add("--rounds", type=int, help="at most (9); --quick 2")
    add("--minutes", type=float, help="that the run may take, three rounds at least (11; --full: no limit)")
    add("--works", default="linear,dequantize,quantize", help="(linear,dequantize,quantize)")
    add("--only", default="", help="labels with one of these in them, as in 'fewbits NF4,bitsandbytes'")
    add("--without", default="", help="libraries to leave out, as in openvino,llama_cpp")
    add("--peers", default=str(HERE.parent / ".venv-peers/bin/python"), help="interpreter that has the peers")
    add("--slice", type=float, default=15.0, help="milliseconds of a slice (15), three calls at least")
    add(
        "--best", action="store_true", help="take the best call of a slice, not the median: for busy machines"
    )
    add("--json", type=Path, help="file for all single figures")
    add("--picture", type=Path, help="file (.svg, .png) for the roofline")
    add("--from-json", type=Path, help="measure nothing; print what this file of --json holds")
    return parser.parse_args()


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def shapes(text: str) -> tuple[Shape, ...]:
    found = [numbers(word.replace("x", ",")) for word in text.split(",")]
    if any(len(shape) != 2 for shape in found):
        raise argparse.ArgumentTypeError(f"write 4096x4096,4096x11008 instead of {text!r}")
    return tuple((shape[0], shape[1]) for shape in found)


def plans(options: argparse.Namespace) -> list[Plan]:
    """What is measured, part by part; every part has rounds of its own."""
    cores = usable_cores()
    threads = options.threads or ((cores,) if options.quick else tuple(dict.fromkeys((cores, 1))))
    works = options.works.split(",")
    parts = []
    for count in threads:
        whole = options.full or options.shapes or count == threads[0]
        for shape in options.shapes or chosen_shapes(options, whole):
            rows = options.rows or chosen_rows(options, whole, shape)
            if "linear" in works:
                parts.append(Plan("linear", shape, rows, count))
            if shape == (options.shapes or chosen_shapes(options, whole))[0]:
                parts += [Plan(work, shape, (0,), count) for work in works if work != "linear"]
    return parts


def chosen_shapes(options: argparse.Namespace, whole: bool) -> tuple[Shape, ...]:
    if options.quick:
        return ((256, 256),)
    return ALL_SHAPES if options.full else DEFAULT_SHAPES if whole else WIDE


def chosen_rows(options: argparse.Namespace, whole: bool, shape: Shape) -> tuple[int, ...]:
    if options.quick:
        return (1, 4)
    return ALL_ROWS if options.full or (whole and shape == WIDE[0]) else (1, 4, 16, 256)


def chosen(options: argparse.Namespace) -> list[Contender]:
    wanted = [word.strip().lower() for word in options.only.split(",") if word.strip()]
    left_out = set(options.without.split(","))
    return [
        one
        for one in CONTENDERS
        if (options.full or not one.full or wanted)
        and one.library not in left_out
        and (not wanted or any(word in one.label.lower() for word in wanted))
    ]


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if options.from_json:
        loaded: dict[str, Any] = json.loads(options.from_json.read_text())
        return loaded
    rounds = options.rounds or (2 if options.quick else 9)
    peers = options.peers if os.access(options.peers, os.X_OK) else sys.executable
    rotation = 0 if options.quick else None
    session = Session(chosen(options), scratch, peers, rounds, options.slice * 1e6, rotation)
    parts = plans(options)
    minutes = options.minutes or (math.inf if options.full else 11)
    deadline = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {
        "cpu": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "load_average": os.getloadavg()[0],
        "cache_bytes": session.cache,
        "parts": [],
    }
    try:
        for number, plan in enumerate(parts):
            progress(f"part {number + 1} of {len(parts)}: {plan}")
            share = plan.cost / sum(one.cost for one in parts[number:])
            results["parts"].append(session.measure(plan, share * (deadline - time.monotonic())))
    finally:
        session.stop()
    return results | {"versions": session.versions, "lost": session.lost, "roofs": ROOFS}


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json and not options.from_json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    for part in results["parts"]:  # one number per slice from here on
        part |= part["best" if options.best else "median"]
    results["statistic"] = "best call" if options.best else "median call"
    print(tables.as_text(results))
    print(goals.as_text(results))
    if options.picture:
        picture.draw(results, options.picture)


if __name__ == "__main__":
    main()

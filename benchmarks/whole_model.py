"""A whole model: loading, memory, prefill and decoding of fewbits beside its peers: `make bench-model`.

Every measurement has a fresh process, and the ways of running the model take turns, so that a slow minute of
the machine hits all of them. Compared are medians over the rounds, and ratios within each round. The model is
a Llama with random weights, generated into a temporary folder (TMPDIR) and deleted after.

`--seven-billion` measures one thing: loading a 7B-shaped checkpoint of 13.5 GB, beside plain reading of its
files; before each, the system is asked to drop what it caches of them (posix_fadvise).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import model_goals
from bench.crew import THREAD_VARIABLES, progress
from bench.goals import table as goal_table
from bench.model_files import SIZES, check_room, forget_pages, parameters
from bench.model_goals import BASE, ratio

from fewbits.machine import cpu_name, usable_cores

HERE = Path(__file__).resolve().parent
WORKER = HERE / "bench" / "model_worker.py"
PACKAGES = ["torch", "transformers", "bitsandbytes", "llama-cpp-python"]
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
NF4_DQ = {**NF4, "bnb_4bit_use_double_quant": True}
LLM = {"load_in_8bit": True}


def everywhere(spelling: str) -> dict[str, Any]:
    """Settings of a FewbitsConfig that quantizes the output layer too."""
    return {"format": spelling, "modules": {"lm_head": spelling}}


@dataclass(frozen=True)
class Variant:
    """A way of running the model; `settings` of a BitsAndBytesConfig, or with "format" of a FewbitsConfig."""

    label: str
    library: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.library in ("torch", "fewbits")


VARIANTS = (
    Variant(BASE, "torch"),
    Variant("fewbits NF4+dq", "fewbits", NF4_DQ),
    Variant("fewbits NF4+dq, head too", "fewbits", everywhere("nf4:g64:dq")),
    Variant("fewbits NF4, head too", "fewbits", everywhere("nf4:g64")),
    Variant("fewbits NF4, int8 act., head too", "fewbits", everywhere("nf4:g64@int8:g64")),
    Variant("fewbits LLM.int8()", "fewbits", LLM),
    Variant("bitsandbytes NF4", "bitsandbytes", NF4),
    Variant("bitsandbytes NF4+dq", "bitsandbytes", NF4_DQ),
    Variant("bitsandbytes LLM.int8()", "bitsandbytes", LLM),
    Variant("llama.cpp Q4_0, head too", "llama_cpp", {"kind": "q4_0"}),
    Variant("llama.cpp IQ4_NL, head too", "llama_cpp", {"kind": "iq4_nl"}),
)

# name in the results: (heading, unit shown, factor to that unit, digits)
COLUMNS = {
    "tokens_per_second": ("decode", "tok/s", 1.0, 1),
    "prefill_seconds": ("prefill", "s", 1.0, 2),
    "load_seconds": ("load", "s", 1.0, 2),
    "peak_bytes": ("peak", "GB", 1e-9, 2),
    "resident_bytes": ("after", "GB", 1e-9, 2),
}


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the temporary folder would stay
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as scratch:
        measure = seven_billion if options.seven_billion else compare
        results = measure(options, Path(scratch))
    results["wall_seconds"] = time.perf_counter() - started
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(loads_as_text(results) if options.seven_billion else as_text(results))


def arguments() -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("--size", choices=SIZES, default="1.1B", help="of the generated model (1.1B)")
    add("--rounds", type=int, default=3, help="measurements of each (3)")
    add("--tokens", type=int, default=32, help="new tokens, after a prompt of 8 (32)")
    add("--prefill", type=int, default=512, help="tokens of the prompt that is timed (512)")
    add("--threads", type=int, default=usable_cores(), help="(all cores)")
    add("--only", default="", help=f"labels with one of these in them, as in 'fewbits,llama', and {BASE}")
    add("--peers", default=str(HERE.parent / ".venv-peers/bin/python"), help="interpreter that has the peers")
    add(
        "--seven-billion",
        action="store_true",
        help="only load a 7B-shaped checkpoint (13.5 GB of disk)",
    )
    add("--json", type=Path, help="file for all single figures")
    return parser.parse_args()


# --- processes --------------------------------------------------------------------------------------


def child(python: str, threads: int, job: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process answers; {"failed": why} when it does not."""
    environment = os.environ | QUIET | {name: str(threads) for name in THREAD_VARIABLES}
    command = [python, str(WORKER), json.dumps(job | {"threads": threads})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        return {"failed": f"ended with {done.returncode}: {words[-1][-300:]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def peers_python(options: argparse.Namespace) -> str:
    return options.peers if os.access(options.peers, os.X_OK) else sys.executable


def about(options: argparse.Namespace, size: str) -> dict[str, Any]:
    job = {"work": "versions", "packages": PACKAGES}
    versions = child(peers_python(options), 1, job) | child(sys.executable, 1, job)
    return {
        "cpu": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/whole_model.py", *sys.argv[1:]]),
        "threads": options.threads,
        "versions": versions,
        "size": size,
        "parameters": parameters(size),
    }


# --- side by side -----------------------------------------------------------------------------------


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All figures: label → one entry per round."""
    peers = peers_python(options)
    words = [word.strip().lower() for word in options.only.split(",") if word.strip()]
    chosen = [
        one
        for one in VARIANTS
        if one.label == BASE or not words or any(word in one.label.lower() for word in words)
    ]
    lost = write_models(options, scratch, chosen, peers)
    figures: dict[str, list[dict[str, Any]]] = {
        one.label: [] for one in chosen if one.settings.get("kind") not in lost
    }
    failed = {f"llama.cpp {kind}": reason for kind, reason in lost.items()}
    for number in range(options.rounds):
        for one in chosen:
            if one.label not in figures:
                continue
            progress(f"round {number + 1} of {options.rounds}: {one.label}")
            answer = child(
                sys.executable if one.ours else peers, options.threads, job_of(options, scratch, one)
            )
            if "failed" in answer:
                failed[one.label] = answer["failed"]
                del figures[one.label]
            else:
                figures[one.label].append(answer)
    settings = {name: getattr(options, name) for name in ("rounds", "tokens", "prefill")}
    return about(options, options.size) | settings | {"figures": figures, "failed": failed}


def write_models(
    options: argparse.Namespace, scratch: Path, chosen: Iterable[Variant], peers: str
) -> dict[str, str]:
    """Write what the variants read; returns kinds of GGUF files that could not be written, and why."""
    check_room(scratch, 4 * parameters(options.size))
    write_llamas(options, scratch, options.size)
    lost: dict[str, str] = {}
    for kind in dict.fromkeys(one.settings["kind"] for one in chosen if one.library == "llama_cpp"):
        for size, name in ((options.size, "model"), ("tiny", "tiny")):
            job = {
                "work": "write_gguf",
                "model": str(scratch / f"{name}-{kind}.gguf"),
                "size": size,
                "kind": kind,
            }
            wrote = child(peers, options.threads, job)
            if "failed" in wrote:
                lost[kind] = wrote["failed"]
    return lost


def write_llamas(options: argparse.Namespace, scratch: Path, size: str) -> None:
    """The model in `scratch`/model, and a tiny one in `scratch`/tiny."""
    for kind, name in ((size, "model"), ("tiny", "tiny")):
        progress(f"writing a random model of {parameters(kind):,} parameters")
        job = {"work": "write_llama", "model": str(scratch / name), "size": kind}
        wrote = child(sys.executable, options.threads, job)
        if "failed" in wrote:
            raise SystemExit(f"error: the model was not written: {wrote['failed']}")


def job_of(options: argparse.Namespace, scratch: Path, one: Variant) -> dict[str, Any]:
    ending = f"-{one.settings['kind']}.gguf" if one.library == "llama_cpp" else ""
    return {
        "work": "llama_cpp" if one.library == "llama_cpp" else "transformers",
        "library": one.library,
        "settings": one.settings,
        "model": str(scratch / f"model{ending}"),
        "warm_up": str(scratch / f"tiny{ending}"),
        "size": options.size,
        "tokens": options.tokens,
        "prefill": options.prefill,
    }


def as_text(results: dict[str, Any]) -> str:
    lines = [
        f"{results['cpu']}, {results['threads']} threads; {results['date']}",
        ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        f"{results['command']}   {results['wall_seconds']:.0f} s",
        "",
        f"Llama of {results['parameters']:,} parameters in bfloat16, random weights",
        f"{'':34}" + "".join(f"{f'{name} {unit}':>14} {'×':>6}" for name, unit, _, _ in COLUMNS.values()),
    ]
    lines += [row(results, label) for label, entries in results["figures"].items() if entries]
    lines += [f"{label:34}left out: {reason}" for label, reason in results["failed"].items()]
    lines += [
        "",
        f"Medians of {results['rounds']} rounds; ×: median of the ratios to {BASE} within each round.",
        f"decode: greedy, one sequence, {results['tokens']} tokens.",
        f"prefill: {results['prefill']} tokens at once, logits of the last.",
        "load: until the first token is there. Quantizing is included, but llama.cpp reads a file that is",
        "quantized already. The system has all files in its cache.",
        "peak: largest resident set until then, mapped files included, above that of the same process after",
        "it loaded and ran a tiny model in the same way; after: what is resident then.",
    ]
    goals = model_goals.GOALS if results["size"] == "1.1B" else ()
    table = "\n" + goal_table(goals, results, "medians; ratios within a round") if goals else ""
    return "\n".join(lines) + table


def row(results: dict[str, Any], label: str) -> str:
    cells = []
    for key, (_, _, factor, digits) in COLUMNS.items():
        found = [entry[key] for entry in results["figures"][label] if key in entry]
        multiple = ratio(results, key, label, BASE)
        value = f"{statistics.median(found) * factor:.{digits}f}" if found else ""
        cells.append(f"{value:>14} {'' if multiple is None else f'{multiple:.2f}':>6}")
    return f"{label:34}" + "".join(cells)


# --- a large checkpoint -----------------------------------------------------------------------------


def seven_billion(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Plain reading and loading by turns, the files dropped from the system's cache before each."""
    size = "7B" if options.size == "1.1B" else options.size
    folder = scratch / "model"
    check_room(scratch, 2 * parameters(size))
    write_llamas(options, scratch, size)
    loading = Variant("fewbits NF4+dq", "fewbits", NF4_DQ)
    jobs = {
        "plain reading": {"work": "read", "model": str(folder)},
        loading.label: job_of(options, scratch, loading) | {"size": size, "tokens": 0, "prefill": 0},
    }
    figures: dict[str, list[dict[str, Any]]] = {label: [] for label in jobs}
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        for label, job in jobs.items():
            forget_pages(folder)
            progress(f"round {number + 1} of {options.rounds}: {label}")
            answer = child(sys.executable, options.threads, job)
            if "failed" in answer:
                failed[label] = answer["failed"]
            else:
                figures[label].append(answer)
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return about(options, size) | {
        "rounds": options.rounds,
        "bytes": file_bytes,
        "figures": figures,
        "failed": failed,
    }


def loads_as_text(results: dict[str, Any]) -> str:
    lines = [
        f"{results['cpu']}, {results['threads']} threads; {results['date']}",
        ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        f"{results['command']}   {results['wall_seconds']:.0f} s",
        "",
        f"Llama of {results['parameters']:,} parameters in bfloat16, {results['bytes'] / 1e9:.2f} GB on disk",
        f"{'':20}{'seconds':>10}{'GB/s of file':>14}{'peak GB':>10}{'after GB':>10}",
    ]
    for label, entries in results["figures"].items():
        if not entries:
            continue
        seconds = statistics.median(entry["load_seconds"] for entry in entries)
        sizes = [
            statistics.median(entry[key] for entry in entries) * 1e-9 if key in entries[0] else None
            for key in ("peak_bytes", "resident_bytes")
        ]
        cells = "".join(f"{'' if size is None else f'{size:.2f}':>10}" for size in sizes)
        lines.append(f"{label:20}{seconds:>10.1f}{results['bytes'] / 1e9 / seconds:>14.2f}{cells}")
    lines += [f"{label:20}failed: {reason}" for label, reason in results["failed"].items()]
    lines += [
        "",
        f"Medians of {results['rounds']} rounds. The files were dropped from the system's cache before each.",
        "Loading ends with the first token. peak: above that of the process after it loaded a tiny model.",
    ]
    return "\n".join(lines) + "\n" + goal_table(model_goals.SEVEN_BILLION, results, "medians")


if __name__ == "__main__":
    main()

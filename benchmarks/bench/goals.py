"""The goals for the CPU engine, each beside the figure that this run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.contenders import BNB, BNB_LLM, OURS, OURS_AVX2, OURS_DQ, OURS_INT8X, OURS_LLM, TORCH
from bench.tables import Part, median_time, ratio, read_share, share, times

Measured = tuple[float, str] | None  # figure, what it was measured at
INT8_PEERS = ("onnxruntime", "openvino", "llama_cpp")


@dataclass(frozen=True)
class Goal:
    """`figure(…)`: what was measured, in the worst case of a run; to stay below if not `at_least`."""

    work: str
    what: str
    wanted: float
    unit: str
    figure: Callable[[Any], Measured]
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.wanted if self.at_least else value <= self.wanted


def worst(found: Iterable[tuple[float | None, str]], at_least: bool = True) -> Measured:
    known = [(value, place) for value, place in found if value is not None]
    return (min if at_least else max)(known) if known else None


def place(part: Part, m: int, more: str = "") -> str:
    return (
        f"{part['shape'][0]}×{part['shape'][1]}" + (f", M = {m}" if m else "") + (f", {more}" if more else "")
    )


def wide(parts: list[Part], work: str = "linear") -> list[Part]:
    """Parts with all threads of this run and shapes of 4096 and up."""
    most = max((part["threads"] for part in parts), default=0)
    return [p for p in parts if p["work"] == work and p["threads"] == most and min(p["shape"]) >= 4096]


def rows_of(part: Part, low: int, high: int) -> list[int]:
    return [m for m in part["rows"] if low <= m <= high]


def one_of(part: Part, label: str) -> Part | None:
    return next((one for one in part["contenders"] if one["label"] == label and "nbytes" in one), None)


def bandwidth(label: str) -> Callable[[list[Part]], Measured]:
    def figure(parts: list[Part]) -> Measured:
        found = []
        for part in wide(parts):
            one = one_of(part, label)
            if one is not None and 1 in part["rows"]:
                found.append((read_share(part, one, 1), place(part, 1)))
        return worst(found)

    return figure


def against(ours: str, peer: str, low: int, high: int) -> Callable[[list[Part]], Measured]:
    """The peer's time over ours."""
    return lambda parts: worst(
        (ratio(part, peer, m, ours), place(part, m)) for part in wide(parts) for m in rows_of(part, low, high)
    )


def against_fastest(
    ours: str, low: int, high: int, peers: Callable[[Part], bool]
) -> Callable[[list[Part]], Measured]:
    """The time of the fastest peer over ours."""

    def figure(parts: list[Part]) -> Measured:
        found = []
        for part in wide(parts):
            labels = [
                one["label"] for one in part["contenders"] if one["library"] != "fewbits" and peers(one)
            ]
            for m in rows_of(part, low, high):
                ratios = [(ratio(part, label, m, ours), label) for label in labels]
                known = [(value, label) for value, label in ratios if value is not None]
                if known:
                    value, label = min(known)
                    found.append((value, place(part, m, label)))
        return worst(found)

    return figure


def four_rows(parts: list[Part]) -> Measured:
    return worst(
        ((ratio(part, OURS, 4, OURS, 1), place(part, 4)) for part in wide(parts)),
        at_least=False,
    )


def dequantize_share(parts: list[Part]) -> Measured:
    found = []
    for part in wide(parts, "dequantize"):
        roof = part["roofs"].get("write, streaming", {}).get("0", [])
        moved = 2 * part["shape"][0] * part["shape"][1]
        found.append((share(moved, times(part, OURS, 0), roof), place(part, 0)))
    return worst(found)


def quantize_speedup(parts: list[Part]) -> Measured:
    pairs = (
        (ratio(part, "bitsandbytes NF4+dq", 0, OURS_DQ), place(part, 0)) for part in wide(parts, "quantize")
    )
    return worst(pairs)


def quantize_rate(parts: list[Part]) -> Measured:
    found = []
    for part in wide(parts, "quantize"):
        taken = median_time(part, OURS_DQ, 0)
        found.append((taken and 2 * part["shape"][0] * part["shape"][1] / taken, place(part, 0)))
    return worst(found)


def is_exact(one: Part) -> bool:
    return bool(one["arithmetic"] != "int8")


def is_int8_peer(one: Part) -> bool:
    return bool(one["arithmetic"] == "int8" and one["library"] in INT8_PEERS)


GOALS = (
    Goal("M = 1", "share of read bandwidth", 0.92, "%", bandwidth(OURS)),
    Goal("M = 1", "faster than bitsandbytes", 1.3, "×", against(OURS, BNB, 1, 1)),
    Goal("M = 1", "faster than the fastest peer", 1.0, "×", against_fastest(OURS, 1, 1, lambda one: True)),
    Goal("M = 4", "time of M = 1", 1.5, "×", four_rows, at_least=False),
    Goal("M = 16", "faster than the fastest exact peer", 1.3, "×", against_fastest(OURS, 16, 16, is_exact)),
    Goal("M = 64…512", "rate of torch bf16 linear", 0.85, "%", against(OURS, TORCH, 64, 512)),
    Goal("M = 64…512", "faster than bitsandbytes", 1.3, "×", against(OURS, BNB, 64, 512)),
    Goal("int8 activations, M ≥ 64", "faster than the fastest int8 peer", 1.5, "×",
         against_fastest(OURS_INT8X, 64, 10**9, is_int8_peer)),
    Goal("LLM.int8(), M = 1", "share of read bandwidth", 0.90, "%", bandwidth(OURS_LLM)),
    Goal("LLM.int8(), M = 4…256", "faster than bitsandbytes", 1.8, "×", against(OURS_LLM, BNB_LLM, 4, 256)),
    Goal("dequantize NF4 → bf16", "share of the streaming-write roof", 0.80, "%", dequantize_share),
    Goal("quantize NF4+dq from bf16", "faster than bitsandbytes", 15.0, "×", quantize_speedup),
    Goal("quantize NF4+dq from bf16", "rate of input", 2.0, "GB/s", quantize_rate),
    Goal("AVX2 forced, M = 1", "share of read bandwidth", 0.85, "%", bandwidth(OURS_AVX2)),
)  # fmt: skip


def as_text(results: dict[str, Any]) -> str:
    return table(GOALS, results["parts"], "the worst place of this run counts")


def table(goals: Iterable[Goal], figures: Any, about: str) -> str:
    """Every goal with the figure beside it."""
    lines = ["", f"## goals ({about})", ""]
    lines += [f"{'work':<34}{'what':<36}{'goal':>11}{'measured':>11}  where"]
    for goal in goals:
        bound = f"{'≥' if goal.at_least else '≤'} {spelled(goal.wanted, goal.unit)}"
        cells = f"{goal.work:<34}{goal.what:<36}{bound:>11}"
        measured = goal.figure(figures)
        if measured is None:
            lines.append(f"{cells}{'':>11}  not measured")
            continue
        value, where = measured
        verdict = "met" if goal.met(value) else "missed"
        lines.append(f"{cells}{spelled(value, goal.unit):>11}  {verdict:<7}{where}".rstrip())
    return "\n".join(lines)


def spelled(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.2f} {unit}"

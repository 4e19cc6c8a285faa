"""The goals for a whole model of 1.1 billion parameters, and for loading one of 7 billion."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.goals import Goal, Measured

BASE = "torch bf16"
OURS = "fewbits NF4+dq"
OURS_HEAD = ("fewbits NF4+dq, head too", "fewbits NF4, head too")
OURS_INT8X = "fewbits NF4, int8 act., head too"
OURS_LLM = "fewbits LLM.int8()"
BNB, BNB_LLM = "bitsandbytes NF4+dq", "bitsandbytes LLM.int8()"
LLAMA_CPP = ("llama.cpp Q4_0, head too", "llama.cpp IQ4_NL, head too")

Results = dict[str, Any]


def ratio(results: Results, key: str, above: str, below: str) -> float | None:
    """Median over rounds of one variant's figure over another's."""
    rows = results["figures"]
    pairs = zip(rows.get(above, []), rows.get(below, []), strict=False)
    found = [a[key] / b[key] for a, b in pairs if b.get(key) and key in a]
    return statistics.median(found) if found else None


def rate_over(key: str, above: str, *below: str) -> Callable[[Results], Measured]:
    """The rate of `above` over the best of `below`."""

    def figure(results: Results) -> Measured:
        found = [(ratio(results, key, above, peer), peer) for peer in below]
        known = [(value, peer) for value, peer in found if value is not None]
        return min(known) if known else None

    return figure


def speedup(key: str, ours: str, *peers: str) -> Callable[[Results], Measured]:
    """The time of the fastest peer over ours."""

    def figure(results: Results) -> Measured:
        found = [(ratio(results, key, peer, ours), peer) for peer in peers]
        known = [(value, peer) for value, peer in found if value is not None]
        return min(known) if known else None

    return figure


def exact_prefill(results: Results) -> Measured:
    value = ratio(results, "prefill_seconds", OURS, BASE)
    return None if value is None else (value, OURS)


def best_head(results: Results) -> Measured:
    found = [rate_over("tokens_per_second", ours, *LLAMA_CPP)(results) for ours in OURS_HEAD]
    return max((one for one in found if one is not None), default=None)


def median(key: str, label: str, factor: float) -> Callable[[Results], Measured]:
    def figure(results: Results) -> Measured:
        found = [entry[key] * factor for entry in results["figures"].get(label, []) if key in entry]
        return (statistics.median(found), label) if found else None

    return figure


GOALS = (
    Goal("decode, head in 16 bit", "rate of bitsandbytes", 1.7, "×",
         rate_over("tokens_per_second", OURS, BNB)),
    Goal("decode, head quantized", "rate of llama.cpp", 1.0, "×", best_head),
    Goal("prefill, exact", "time of torch bf16", 1.0, "×",
         exact_prefill, at_least=False),
    Goal("prefill, int8 activations", "faster than llama.cpp", 2.0, "×",
         speedup("prefill_seconds", OURS_INT8X, *LLAMA_CPP)),
    Goal("load NF4+dq", "faster than bitsandbytes", 4.0, "×", speedup("load_seconds", OURS, BNB)),
    Goal("load NF4+dq", "peak memory", 1.5, "GB", median("peak_bytes", OURS, 1e-9), at_least=False),
    Goal("decode, LLM.int8()", "rate of bitsandbytes", 1.8, "×",
         rate_over("tokens_per_second", OURS_LLM, BNB_LLM)),
)  # fmt: skip

SEVEN_BILLION = (
    Goal("load 7B as NF4+dq", "peak memory", 5.5, "GB", median("peak_bytes", "fewbits NF4+dq", 1e-9),
         at_least=False),
)  # fmt: skip

"""The benchmarks run, and their arithmetic is right. Nothing here depends on how fast anything is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench import goals, tables
from bench.contenders import BNB, CONTENDERS, OURS, ROOFS, TORCH
from bench.libraries import MOST_COPIES, Task
from bench.session import Plan, rounded, write_inputs

REPO = Path(__file__).resolve().parent.parent.parent
SCRIPT = REPO / "benchmarks" / "kernels.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPO / "src")},
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """A run with one tiny shape and a peer whose interpreter does not work."""
    folder = tmp_path_factory.mktemp("bench")
    done = run(
        *("--quick", "--only", "fewbits NF4+dq,fewbits LLM.int8(),ONNX Runtime g64, level 4", "--threads", 1),
        *("--peers", "/bin/false", "--slice", 1, "--json", folder / "all.json"),
        *("--picture", folder / "roofline.svg"),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "all.json").read_text()), folder


def test_a_quick_run_measures_everything_asked_for(quick):
    _, results, folder = quick
    assert [part["work"] for part in results["parts"]] == ["linear", "dequantize", "quantize"]
    linear = results["parts"][0]
    assert linear["shape"] == [256, 256]
    for label in ("fewbits NF4+dq", "fewbits LLM.int8()"):
        for m in ("1", "4"):
            taken = linear["median"]["ns"][label][m]
            assert len(taken) == linear["rounds"] == 2
            assert min(taken) > 0
            best = linear["best"]["ns"][label][m]
            assert all(low <= middle for low, middle in zip(best, taken, strict=True))
    assert (folder / "roofline.svg").read_text().startswith("<?xml")


def test_errors_of_products_are_measured(quick):
    _, results, _ = quick
    known = {one["label"]: one for one in results["parts"][0]["contenders"]}
    nf4 = known["fewbits NF4+dq"]
    assert nf4["product_error"] < 0.01 < nf4["total_error"] < 0.2
    assert nf4["nbytes"] * 8 / 256**2 == pytest.approx(4.13, abs=0.2)
    assert known["fewbits LLM.int8()"]["total_error"] < 0.05


def test_a_peer_that_does_not_start_is_named_and_left_out(quick):
    text, results, _ = quick
    assert "onnxruntime" in results["lost"]
    _, _, after = text.partition("left out:")
    assert "onnxruntime" in after
    assert (
        "ONNX Runtime g64, level 4" not in results["parts"][0]["median"]["ns"]
        or not (results["parts"][0]["median"]["ns"]["ONNX Runtime g64, level 4"])
    )


def test_a_run_can_be_printed_again(quick):
    text, _, folder = quick
    again = run("--from-json", folder / "all.json")
    assert again.returncode == 0, again.stderr
    assert again.stdout == text


def test_labels_name_one_contender_of_a_work():
    names = [(one.work, one.label) for one in CONTENDERS]
    assert len(set(names)) == len(names)
    for one in CONTENDERS:
        assert (REPO / f"benchmarks/bench/libraries/with_{one.library}.py").is_file()


def test_copies_fill_the_rotation_but_stay_few():
    task = Task("", "linear", "bf16", "", 128 << 20, 2)
    assert task.copies(8 << 20) == 16
    assert task.copies(1 << 30) == 2
    assert task.copies(1) == MOST_COPIES


def test_inputs_are_bfloat16_values_with_outliers_where_asked(tmp_path):
    files = write_inputs(Plan("linear", (8, 64), (1, 3), 1), tmp_path)
    weight, x = np.load(files["weight", 0]), np.load(files["x", 3])
    assert x.shape == (3, 64)
    assert np.array_equal(rounded(weight), weight)
    probe = np.load(files["x", 0]).astype(np.float64)
    assert np.array_equal(np.load(files["x product", 0]), probe @ weight.astype(np.float64).T)
    large = np.abs(np.load(files["outliers", 3])) >= 6
    assert large.all(0).sum() == 6
    assert not large[:, ~large.all(0)].any()


def part_of(**times: list[float]) -> dict:
    """A linear part with M = 1 and 64 for all labels given (spaces as underscores)."""
    labels = {name.replace("_", " "): taken for name, taken in times.items()}
    return {
        "work": "linear",
        "shape": [4096, 4096],
        "rows": [1, 64],
        "threads": 2,
        "rounds": 3,
        "contenders": [
            {"label": label, "arithmetic": "bf16", "library": label.split()[0], "nbytes": 100.0}
            for label in labels
        ],
        "ns": {label: {"1": taken, "64": taken} for label, taken in labels.items()},
        "roofs": {"read": {"1": [10.0] * 3, "64": [10.0] * 3}, "bf16": {"1": [9e8] * 3, "64": [9e8] * 3}},
    }


def test_ratios_are_taken_within_a_round():
    # The second round was three times as slow for everyone; medians of times alone would say 1.
    part = part_of(fewbits_NF4=[10, 30, 10], bitsandbytes_NF4=[20, 60, 20])
    assert tables.ratio(part, BNB, 1, OURS) == 2
    part["ns"][BNB]["1"] = [20, 30, 60]
    assert tables.ratio(part, BNB, 1, OURS) == 2


def test_shares_are_of_the_roof_of_the_same_round():
    part = part_of(fewbits_NF4=[20, 40, 20])
    one = part["contenders"][0]
    assert tables.read_share(part, one, 1) == pytest.approx(0.5)
    part["roofs"]["read"]["1"] = [10.0, 5.0, 10.0]
    assert tables.read_share(part, one, 1) == pytest.approx(0.5)


def test_the_faster_kind_of_pages_is_the_roof():
    part = part_of(fewbits_NF4=[20, 20, 20])
    part["roofs"]["read, 2 MiB pages"] = {"1": [20.0] * 3}
    assert tables.read_share(part, part["contenders"][0], 1) == pytest.approx(0.25)


def test_goals_are_judged_by_the_worst_place():
    fast = part_of(fewbits_NF4=[10] * 3, bitsandbytes_NF4=[20] * 3, torch_bf16=[9] * 3)
    slow = {
        **part_of(fewbits_NF4=[10] * 3, bitsandbytes_NF4=[11] * 3, torch_bf16=[9] * 3),
        "shape": [4096, 8192],
    }
    by_name = {(goal.work, goal.what): goal for goal in goals.GOALS}
    against = by_name["M = 1", "faster than bitsandbytes"]
    assert against.figure([fast]) == (2, "4096×4096, M = 1")
    value, where = against.figure([fast, slow])
    assert value == pytest.approx(1.1)
    assert where.startswith("4096×8192")
    assert not against.met(value)
    rate = by_name["M = 64…512", "rate of torch bf16 linear"]
    assert rate.figure([fast])[0] == pytest.approx(0.9)
    assert rate.met(0.9)


def test_a_goal_that_nobody_measured_says_so():
    text = goals.as_text({"parts": [part_of(torch_bf16=[9] * 3)]})
    assert text.count("not measured") == len(goals.GOALS)
    assert TORCH not in text.partition("where")[2].replace("rate of torch bf16 linear", "")


def test_narrow_shapes_and_fewer_threads_do_not_count_for_goals():
    narrow = {**part_of(fewbits_NF4=[9] * 3, bitsandbytes_NF4=[9] * 3), "shape": [1024, 1024]}
    fewer = {**part_of(fewbits_NF4=[9] * 3, bitsandbytes_NF4=[9] * 3), "threads": 1}
    wide = part_of(fewbits_NF4=[9] * 3, bitsandbytes_NF4=[18] * 3)
    against = next(goal for goal in goals.GOALS if goal.what == "faster than bitsandbytes")
    assert against.figure([narrow, fewer, wide])[0] == 2


def test_every_roof_has_a_unit():
    assert set(ROOFS.values()) == {"GB/s", "GFLOP/s"}

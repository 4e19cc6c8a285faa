"""`fewbits doctor`: what it finds, and what it makes of it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import machine
from fewbits.cli.doctor import OLDEST, Finding, examine, find

ROOT = Path(__file__).resolve().parents[2]
Fewbits = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    """The facts of this machine, without what may be wrong with it."""
    facts = examine()
    facts["threads"] = {"torch": 1, "openmp": ["/lib/libgomp.so.1"]}
    facts["cpu"] |= {"usable_cores": 4, "quota": None}
    facts["environment"]["OMP_NUM_THREADS"] = None
    facts["bitsandbytes"] = {"installed": False, "served_by": "fewbits"}
    facts["versions"] |= {name: f"{oldest}.0" for name, oldest in OLDEST.items()}
    return facts


def changed(facts: dict[str, Any], part: str, **changes: object) -> list[Finding]:
    different = copy.deepcopy(facts)
    different[part] |= changes
    return list(find(different))


class TestCommand:
    def test_json(self, fewbits: Fewbits) -> None:
        done = fewbits("doctor", "--json", env={"OMP_NUM_THREADS": "4096", "HF_HOME": "/somewhere"})
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert {"fewbits", "python", "torch", "transformers", "bitsandbytes"} <= set(report["versions"])
        assert report["cpu"]["usable_cores"] >= 1
        assert 0 < report["memory"]["available"] <= report["memory"]["total"]
        assert "used" in report["backends"]["linear"].values()
        assert report["environment"]["HF_HOME"] == "/somewhere"
        problems = [finding["problem"] for finding in report["findings"]]
        assert any("OMP_NUM_THREADS=4096" in problem for problem in problems)

    def test_text(self, fewbits: Fewbits) -> None:
        done = fewbits("doctor")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
        assert {"python", "torch", "transformers", "processor", "memory", "OpenMP"} <= set(lines)
        assert lines["python"].strip().count(".") == 2

    def test_a_version_too_old_is_said_first_and_fails(self, fewbits: Fewbits, tmp_path: Path) -> None:
        for name, found in (("safetensors", "0.4.5"), ("accelerate", "0.30.0")):
            metadata = tmp_path / f"{name}-{found}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
        paths = f"{ROOT / 'src'}:{tmp_path}"
        done = fewbits("doctor", env={"PYTHONPATH": paths})
        assert done.returncode == 1
        assert done.stdout.startswith("! safetensors 0.4.5 is older than 0.5: pip install --upgrade")
        assert "accelerate 0.30.0 is older than 1.1" in done.stdout
        assert done.stderr.splitlines()[-1].startswith("failed: safetensors 0.4.5 is older than 0.5; ")

    def test_wrong_arguments(self, fewbits: Fewbits) -> None:
        done = fewbits("doctor", "--cure")
        assert (done.returncode, done.stdout) == (2, "")
        assert "--cure" in done.stderr


class TestFindings:
    def test_none(self, healthy: dict[str, Any]) -> None:
        assert list(find(healthy)) == []

    @pytest.mark.parametrize("name", OLDEST)
    def test_missing_or_old_packages_are_fatal(self, name: str, healthy: dict[str, Any]) -> None:
        (missing,) = changed(healthy, "versions", **{name: None})
        assert missing.fatal
        assert f"{name} is not installed" in missing.problem
        (old,) = changed(healthy, "versions", **{name: "0.0.9+local"})
        assert old.fatal
        assert OLDEST[name] in old.mend

    @pytest.mark.parametrize("found", ["5.10", "5.10.0", "5.10.0rc1", "5.11.0.dev0", "6.0"])
    def test_versions_are_numbers_not_text(self, found: str, healthy: dict[str, Any]) -> None:
        assert changed(healthy, "versions", transformers=found) == []

    def test_transformers_that_cannot_be_imported(self, healthy: dict[str, Any]) -> None:
        (finding,) = find({**healthy, "import_problem": "No module named 'tokenizers'"})
        assert finding.fatal
        assert "No module named 'tokenizers'" in finding.problem

    def test_two_openmp_runtimes(self, healthy: dict[str, Any]) -> None:
        both = ["/a/libgomp-1.so", "/b/libiomp5.so"]
        (finding,) = changed(healthy, "threads", openmp=both)
        assert not finding.fatal
        assert "libgomp-1.so, libiomp5.so" in finding.problem

    def test_more_threads_than_cores(self, healthy: dict[str, Any]) -> None:
        (asked,) = changed(healthy, "environment", OMP_NUM_THREADS="5")
        assert "OMP_NUM_THREADS=5" in asked.problem
        assert asked.mend == "set OMP_NUM_THREADS=4"
        assert changed(healthy, "environment", OMP_NUM_THREADS="4") == []
        (chosen,) = changed(healthy, "threads", torch=5)
        assert chosen.mend == "set OMP_NUM_THREADS=4"

    def test_a_quota_counts_as_cores(self, healthy: dict[str, Any]) -> None:
        limited = copy.deepcopy(healthy)
        limited["cpu"]["quota"] = 2.5
        limited["threads"]["torch"] = 4
        (finding,) = find(limited)
        assert finding.mend == "set OMP_NUM_THREADS=2"

    def test_who_serves_bitsandbytes(self, healthy: dict[str, Any]) -> None:
        (finding,) = changed(healthy, "bitsandbytes", installed=True, served_by="bitsandbytes")
        assert not finding.fatal
        assert "fewbits.enable(takeover=True)" in finding.mend


def test_the_oldest_versions_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required = dict(re.findall(r'^  "([a-z]+)>=([\d.]+)",$', text.partition("[project.optional")[0], re.M))
    assert {name: required[name] for name in OLDEST} == OLDEST


class TestMachine:
    def test_memory_is_limited_by_control_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = machine.memory()
        assert free.available <= free.total
        limit = machine.resident_bytes() + 10**6
        groups = {"memory.max": ["max", str(limit)]}
        monkeypatch.setattr(machine, "_control_groups", lambda name: iter(groups.get(name, [])))
        limited = machine.memory()
        assert limited.limit == limit
        assert limited.available <= 2 * 10**6

    def test_no_limit_is_no_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_control_groups", lambda name: iter(["max"] if "max" in name else []))
        assert machine.memory().limit is None
        assert machine.cpu_quota() is None

    def test_accelerators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def current(check_available: bool) -> torch.device:
            return torch.device("cuda")

        monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 20))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
        found = machine.accelerators()
        assert found == {
            "cuda:0": ("card 0", machine.Memory(20, 10)),
            "cuda:1": ("card 1", machine.Memory(20, 11)),
        }

    def test_flags_are_those_of_one_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n"
        monkeypatch.setattr(Path, "read_text", lambda self: text)
        assert machine.cpu_flags() == {"fpu", "avx2", "fma"}

    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            ({"cpu.max": ["150000 100000", "max 100000"]}, 1.5),
            ({"cpu.cfs_quota_us": ["-1", "50000"], "cpu.cfs_period_us": ["100000", "100000"]}, 0.5),
            ({"cpu.cfs_quota_us": ["-1"], "cpu.cfs_period_us": ["100000"]}, None),
        ],
    )
    def test_quota(
        self, groups: dict[str, list[str]], expected: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "_control_groups", lambda name: iter(groups.get(name, [])))
        assert machine.cpu_quota() == expected

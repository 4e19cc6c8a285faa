"""`fewbits doctor`: what this installation runs on, and what stands in its way."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import fewbits
from fewbits.backends import explain
from fewbits.cli.common import AsJson, FailedCheckError, format_bytes, print_json, results
from fewbits.integrations import owns_bitsandbytes
from fewbits.machine import (
    accelerators,
    cpu_flags,
    cpu_name,
    cpu_quota,
    memory,
    openmp_runtimes,
    usable_cores,
)

# Oldest versions that fewbits works with; pyproject.toml says the same.
OLDEST = {"torch": "2.8", "transformers": "5.10", "safetensors": "0.5", "accelerate": "1.1"}
_PACKAGES = (*OLDEST, "tokenizers", "huggingface_hub", "peft", "bitsandbytes")
# In the words of Linux; what kernels for quantized weights make use of.
_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
_VARIABLES = ("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Finding:
    """Something to act on. fatal: fewbits does not work before it is mended."""

    problem: str
    mend: str
    fatal: bool = False


def doctor(as_json: AsJson = False) -> None:
    """Show versions, processor, memory, accelerators and settings; first, what should be mended.

    Ends with 1 when something makes fewbits unusable.

    Example: fewbits doctor
    """
    facts = examine()
    findings = list(find(facts))
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], **facts})
    else:
        _show(facts, findings)
    fatal = [finding for finding in findings if finding.fatal]
    if fatal:
        raise FailedCheckError(f"{fatal[0].problem}; {fatal[0].mend}")


def examine() -> dict[str, Any]:
    """The facts, as JSON values."""
    import torch

    main, problem = memory(), _import_problem()
    return {
        "versions": {
            "fewbits": fewbits.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "import_problem": problem,
        "system": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "quota": cpu_quota(),
            "flags": [flag for flag in _FLAGS if flag in cpu_flags()],
        },
        "memory": asdict(main),
        "accelerators": {name: {"name": one, **asdict(size)} for name, (one, size) in accelerators().items()},
        "backends": explain("nf4:g64", accelerator_or_cpu()),
        "threads": {"torch": torch.get_num_threads(), "openmp": _openmp_runtimes()},
        "bitsandbytes": {
            "installed": importlib.util.find_spec("bitsandbytes") is not None,
            "served_by": "fewbits" if owns_bitsandbytes() else "bitsandbytes",
        },
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
    }


def accelerator_or_cpu() -> str:
    """The type of device that models go to by default."""
    return next(iter(accelerators()), "cpu").partition(":")[0]


def find(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """What of `facts` should be mended, the worst first."""
    versions, cpu = facts["versions"], facts["cpu"]
    for name, oldest in OLDEST.items():
        found = versions[name]
        if found is None:
            yield Finding(f"{name} is not installed", f'pip install "{name}>={oldest}"', fatal=True)
        elif _numbers(found) < _numbers(oldest):
            mend = f'pip install --upgrade "{name}>={oldest}"'
            yield Finding(f"{name} {found} is older than {oldest}", mend, fatal=True)
    if facts["import_problem"] and versions["transformers"] is not None:
        mend = "install the package that it names, or transformers again"
        yield Finding(f"transformers cannot be imported: {facts['import_problem']}", mend, fatal=True)
    if len(runtimes := facts["threads"]["openmp"]) > 1:
        yield Finding(
            f"{len(runtimes)} OpenMP runtimes are loaded, whose threads fight for the cores: "
            f"{', '.join(Path(one).name for one in runtimes)}",
            "import torch before other packages, or take the package out that brings the second",
        )
    wanted = facts["environment"]["OMP_NUM_THREADS"]
    cores = min(cpu["usable_cores"], max(1, int(cpu["quota"] or cpu["usable_cores"])))
    if wanted and wanted.isdigit() and int(wanted) > cores:
        yield Finding(
            f"OMP_NUM_THREADS={wanted}, but this process may use {cores} cores",
            f"set OMP_NUM_THREADS={cores}",
        )
    elif facts["threads"]["torch"] > cores:
        threads = facts["threads"]["torch"]
        yield Finding(
            f"torch runs {threads} threads, but this process may use {cores} cores",
            f"set OMP_NUM_THREADS={cores}",
        )
    if facts["bitsandbytes"]["served_by"] == "bitsandbytes":
        yield Finding(
            "the bitsandbytes package is installed and serves BitsAndBytesConfig",
            "to have fewbits serve it, call fewbits.enable(takeover=True), or uninstall bitsandbytes",
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu → (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process, in which torch and transformers are loaded."""
    if Path("/proc/self/maps").is_file():
        return sorted(openmp_runtimes())
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    pools = importlib.import_module("threadpoolctl").threadpool_info()
    return sorted({pool["filepath"] for pool in pools if pool["user_api"] == "openmp"})


def _import_problem() -> str | None:
    """Why transformers cannot be imported, if it cannot."""
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        return " ".join(str(error).split())
    return None


# --- output ------------------------------------------------------------------------------------------


def _show(facts: Mapping[str, Any], findings: list[Finding]) -> None:
    console = results()
    for finding in findings:
        style = "bold red" if finding.fatal else "bold yellow"
        console.print(Text("! ", style).append(f"{finding.problem}: {finding.mend}.", "default"))
    if not findings:
        console.print(Text("Nothing to mend.", "bold green"))
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _lines(facts):
        table.add_row(name, Text(value))
    console.print("", table, sep="\n")


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in facts["versions"].items():
        yield name, found or "not installed"
    cpu, main = facts["cpu"], facts["memory"]
    yield "system", facts["system"]
    quota = "" if cpu["quota"] is None else f", limited to the time of {cpu['quota']:g}"
    yield "processor", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores to be used{quota}"
    yield "instructions", " ".join(cpu["flags"]) or "unknown"
    limit = "" if main["limit"] is None else f", limited to {format_bytes(main['limit'])}"
    yield "memory", f"{format_bytes(main['available'])} of {format_bytes(main['total'])} available{limit}"
    for name, one in facts["accelerators"].items():
        free = f"{format_bytes(one['available'])} of {format_bytes(one['total'])} available"
        yield name, f"{one['name']}, {free}"
    if not facts["accelerators"]:
        yield "accelerators", "none that torch can use"
    for name, why in facts["backends"]["linear"].items():
        yield f"backend {name}", f"{why}; plain PyTorch" if name == "reference" else why
    sets = facts["backends"].get("instruction set", {})
    if sets:
        used = next(name for name, state in sets.items() if state == "used")
        yield "kernels for", f"{used} (there are {', '.join(sets)})"
    threads = facts["threads"]
    yield "threads", f"{threads['torch']} of torch"
    yield "OpenMP", ", ".join(threads["openmp"]) or "no runtime found"
    yield "BitsAndBytesConfig", f"served by {facts['bitsandbytes']['served_by']}"
    for name, setting in facts["environment"].items():
        yield name, "not set" if setting is None else setting

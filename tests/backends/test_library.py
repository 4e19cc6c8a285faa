"""How the library of CPU kernels is found, chosen from, refused, and told about tensors."""

from __future__ import annotations

import ctypes.util
import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch

from fewbits.backends import BACKENDS, cpu, explain
from fewbits.backends.cpu import codes, library, structs
from fewbits.format import Format

REPORT = """
import json, torch
import fewbits.ops
from fewbits.backends import explain
from fewbits.backends.cpu import library
answer = {"linear": explain("nf4:g64")["linear"], "reason": library.unavailable()}
if not answer["reason"]:
    answer["sets"] = library.instruction_sets()
quantized = fewbits.ops.quantize(torch.ones(4, 64), "nf4:g64")
answer["works"] = fewbits.ops.linear(torch.ones(1, 64), quantized).tolist() == [[64.0] * 4]
print(json.dumps(answer))
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "FEWBITS_ISA"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=given | environment
    )


def report(**environment: str) -> dict:
    done = run(REPORT, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_best_instruction_set_is_used(isas):
    answer = report()
    assert answer["linear"] == {"cpu": "used", "reference": "not reached"}
    assert [name for name, state in answer["sets"].items() if state == "used"] == isas[:1]
    assert answer["sets"]["portable"] == ("used" if isas == ["portable"] else "not reached")
    assert answer["works"]


def test_every_instruction_set_can_be_forced(isas):
    for name in isas[1:]:
        answer = report(FEWBITS_ISA=name)
        assert [other for other, state in answer["sets"].items() if state == "used"] == [name]
        assert answer["sets"][isas[0]] == f"FEWBITS_ISA is {name}"
        assert answer["works"]


@pytest.mark.parametrize("name", ["avx1024", "neon" if sys.platform != "darwin" else "avx2"])
def test_an_instruction_set_that_does_not_work_is_an_error_that_names_those_that_do(name, isas):
    if name in isas:
        pytest.skip(f"this machine runs {name}")
    done = run(REPORT, FEWBITS_ISA=name)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"ValueError: FEWBITS_ISA is '{name}': ")
    assert error.endswith(f"write one of {', '.join(isas)}, or unset it for {isas[0]}")


def test_without_a_library_the_reference_computes_and_the_reason_is_told(tmp_path):
    answer = report(FEWBITS_LIBRARY=str(tmp_path / "gone.so"))
    reason = f"FEWBITS_LIBRARY is {tmp_path / 'gone.so'}, which is no file"
    assert answer["linear"] == {"cpu": reason, "reference": "used"}
    assert answer["reason"] == reason
    assert answer["works"]


def test_a_file_that_is_no_library_is_a_reason(tmp_path):
    path = tmp_path / "broken.so"
    path.write_text("not a library")
    assert f"its library {path} cannot be loaded: " in report(FEWBITS_LIBRARY=str(path))["reason"]


def other_library() -> str:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return next(line.split()[-1] for line in maps if "/libc.so" in line)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks for a library in /proc")
def test_another_library_is_a_reason():
    path = other_library()
    assert report(FEWBITS_LIBRARY=path)["reason"] == (
        f"its library {path} has no function fewbits_abi; build it anew"
    )


def test_a_library_of_another_version_is_a_reason(monkeypatch):
    found = library.ABI
    monkeypatch.setattr(library, "ABI", 99)
    with pytest.raises(library.UnavailableError, match=f"interface {found}, not 99; build it anew"):
        library._load()


def test_a_library_that_was_not_built_is_a_reason(monkeypatch):
    monkeypatch.delenv("FEWBITS_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_NAME", "libfewbits_gone.so")
    with pytest.raises(
        library.UnavailableError, match=r"_gone\.so was not built: install fewbits from a wheel"
    ):
        library._load()


def test_explain_tells_the_instruction_set_and_why_not_another(isas):
    answer = explain("nf4:g64")
    assert answer["instruction set"] == library.instruction_sets()
    assert answer["instruction set"][isas[0]] in ("used", f"FEWBITS_ISA is {os.environ.get('FEWBITS_ISA')}")
    assert "instruction set" not in explain("nf4:g64", "cuda")


def test_other_devices_are_refused():
    for op in ("linear", "dequantize"):
        assert cpu.refuse(op, Format.parse("nf4"), torch.device("meta")) == "has no kernels for meta"
    assert explain("nf4", "cuda:0")["linear"] == {"cpu": "has no kernels for cuda", "reference": "used"}
    assert BACKENDS[0].name == "cpu"


def test_what_the_library_refuses_is_raised_in_its_words():
    weight = codes.quantize(torch.randn(4, 64), Format.parse("nf4:g64"))
    struct = structs.Weight.from_buffer_copy(structs.describe(weight))
    struct.codes_bytes -= 1
    out = torch.empty(4, 64)
    place = (out.data_ptr(), out.numel(), 64, 0, 1)
    decode = library.library().fewbits_dequantize
    for change, text in {
        "codes_bytes": "the codes of this weight take 128 bytes, got 127",
        "bits": "codes have 2, 3, 4 or 8 bits, got 5",
        "scale_bytes": "4 scales take 16 bytes, got 3",
    }.items():
        struct = structs.Weight.from_buffer_copy(structs.describe(weight))
        setattr(struct, change, {"codes_bytes": 127, "bits": 5, "scale_bytes": 3}[change])
        with pytest.raises(ValueError, match=f"decoding: {text}"):
            library.check(decode(struct, None, 0, 4, 0, 64, *place), "decoding")
    struct = structs.describe(weight)
    for rows, columns, text in [
        ((0, 5), (0, 64), "rows 0 \\+ 5 of a weight with 4"),
        ((0, 4), (1, 64), "columns 1 \\+ 64 of a weight \\[4, 64\\]"),
        ((-1, 4), (0, 64), "rows -1 \\+ 4"),
    ]:
        with pytest.raises(ValueError, match=text):
            library.check(decode(struct, None, *rows, *columns, *place), "decoding")
    with pytest.raises(ValueError, match="the result takes 256 elements, got 255"):
        library.check(decode(struct, None, 0, 4, 0, 64, out.data_ptr(), 255, 64, 0, 1), "decoding")


def test_statuses_have_exceptions():
    for status, error in {1: ValueError, 3: MemoryError, 4: NotImplementedError, 77: RuntimeError}.items():
        with pytest.raises(error, match="doing it: "):
            library.check(status, "doing it")
    library.check(0, "doing it")


# --- structs ----------------------------------------------------------------------------------------


def test_structs_are_as_large_as_in_c():
    assert ctypes.sizeof(structs.Weight) == 13 * 8 + 8 * 4
    assert ctypes.sizeof(structs.Encoding) == 7 * 8 + 15 * 4 + 4
    assert ctypes.sizeof(structs.Product) == 6 * 8 + 4 * 4


def test_a_weight_is_described_once():
    weight = codes.quantize(torch.randn(8, 64), Format.parse("nf4:g64:dq"))
    assert structs.describe(weight) is structs.describe(weight)
    again = codes.quantize(torch.randn(8, 64), Format.parse("nf4:g64:dq"))
    assert structs.describe(again) is not structs.describe(weight)


def test_a_description_keeps_no_tensor_alive():
    weight = codes.quantize(torch.randn(8, 64), Format.parse("int4:g32:dq:zero"))
    structs.describe(weight)
    gone = [weakref.ref(part) for part in weight.parts().values()]
    del weight
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_memory_that_is_used_again_is_described_anew():
    memory = torch.zeros(2**12, dtype=torch.uint8)
    for spelling, shape in [
        ("nf4:g64", (8, 64)),
        ("nf4:g32", (8, 64)),
        ("nf4:g64", (4, 128)),
        ("int8:row", (4, 64)),
    ]:
        format = Format.parse(spelling)
        source = torch.randn(shape)
        made = codes.quantize(source, format)
        start, parts = 0, {}
        for name, part in made.parts().items():
            place = memory[start : start + part.nbytes].view(part.dtype).view(part.shape)
            parts[name], start = place.copy_(part), start + -(-part.nbytes // 64) * 64
        moved = type(made).from_parts(parts, format, shape)
        assert torch.equal(codes.dequantize(moved, torch.float32), codes.dequantize(made, torch.float32))


def test_many_descriptions_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(structs, "_REMEMBERED", 5)
    weights = [codes.quantize(torch.randn(4, 64), Format.parse("nf4")) for _ in range(12)]
    for weight in weights:
        structs.describe(weight)
    assert len(structs._described) <= 6
    assert torch.equal(weights[0].dequantize(), codes.dequantize(weights[0], torch.float32))


def test_parts_with_gaps_or_on_odd_addresses_are_copied():
    weight = codes.quantize(torch.randn(16, 64), Format.parse("int4:g32"))
    wanted = codes.dequantize(weight, torch.float32)
    assert structs.dense(weight) is weight
    with_gaps = torch.zeros(16, 64, dtype=torch.uint8)[:, ::2].copy_(weight.codes)
    odd = torch.zeros(129, dtype=torch.uint8)[1:]
    odd.copy_(weight.scale.view(-1).view(torch.uint8))
    from_file = torch.frombuffer(
        bytearray(b"x" + odd.numpy().tobytes()), dtype=torch.float32, offset=1, count=32
    )
    for codes_part, scale in [(with_gaps, weight.scale), (weight.codes, from_file.view(16, 2))]:
        strange = type(weight)(codes_part, scale, weight.format, weight.shape)
        assert structs.dense(strange) is not strange
        assert torch.equal(codes.dequantize(strange, torch.float32), wanted)


def test_a_part_on_another_device_is_refused_by_name():
    weight = codes.quantize(torch.randn(4, 64), Format.parse("nf4"))
    strange = type(weight)(weight.codes, weight.scale.to("meta"), weight.format, weight.shape)
    with pytest.raises(ValueError, match="scale of a weight on the CPU is on meta; move it there"):
        codes.dequantize(strange, torch.float32)


# --- threads ----------------------------------------------------------------------------------------

THREADS = """
import json, os, torch
import fewbits.ops
from threadpoolctl import threadpool_info
torch.set_num_threads(2)
torch.randn(400, 400) @ torch.randn(400, 400)
torch.randn(1_000_000).exp()
before = len(os.listdir("/proc/self/task"))
weight = fewbits.ops.quantize(torch.randn(512, 1024), "nf4:g64:dq")
weight.dequantize()
for rows in (1, 4, 300):
    fewbits.ops.linear(torch.randn(rows, 1024), weight)
runtimes = [pool["filepath"] for pool in threadpool_info() if pool["user_api"] == "openmp"]
from fewbits.backends.cpu import library
print(json.dumps([before, len(os.listdir("/proc/self/task")), runtimes, library._parallel()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_work_is_done_by_the_threads_that_torch_has():
    done = run(THREADS, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    before, after, runtimes, parallel = json.loads(done.stdout)
    assert parallel, "torch's OpenMP runtime was not found"
    assert len(runtimes) == 1, f"{runtimes}: two pools of threads spin on the same cores"
    assert after == before, "threads of another pool were started"

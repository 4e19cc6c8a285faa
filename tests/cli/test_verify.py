"""`fewbits verify`: what it finds, and how it says so."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fewbits.cli.common import byte_progress
from fewbits.cli.verify import Check, check_folder
from fewbits.config import FewbitsConfig
from fewbits.model import quantize_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes"
CHECKS = ("config", "files", "headers", "tensors", "hashes", "parts", "values", "codes and scales")
NAN, INF = float("nan"), float("inf")

Fewbits = Callable[..., Any]


def verified(path: Path) -> dict[str, Check]:
    """The checks of a folder by name."""
    with byte_progress(quiet=True) as progress:
        checks = check_folder(path, progress).checks
    assert tuple(check.name for check in checks) == CHECKS
    assert all(check.detail for check in checks)
    return {check.name: check for check in checks}


def failures(path: Path) -> dict[str, str]:
    return {name: check.detail for name, check in verified(path).items() if check.ok is False}


def write(path: Path, tensors: Mapping[str, Tensor], quantization: Any = None) -> Path:
    (path / "config.json").write_text(
        json.dumps({} if quantization is None else {"quantization_config": quantization})
    )
    safetensors.torch.save_file(
        {name: one.contiguous() for name, one in tensors.items()}, path / "model.safetensors"
    )
    return path


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 32, 64))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)
        self.experts = Experts()


def quantized(path: Path, config: FewbitsConfig, **changed: Tensor) -> Path:
    """A model in fewbits' own schema, with some tensors replaced (dots as double underscores)."""
    model = Model()
    quantize_model(model, config)
    tensors = dict(model.state_dict())
    for name, tensor in changed.items():
        assert tensors[name.replace("__", ".")].shape == tensor.shape
        tensors[name.replace("__", ".")] = tensor
    return write(path, tensors, config.to_dict())


def state(config: str) -> dict[str, Tensor]:
    model = Model()
    quantize_model(model, FewbitsConfig(config))
    return dict(model.state_dict())


def with_value(tensor: Tensor, value: float, *place: int) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


class TestSound:
    def test_a_plain_checkpoint(self, demo_model: Path) -> None:
        checks = verified(demo_model)
        assert {name for name, check in checks.items() if check.ok is None} == {"hashes", "codes and scales"}
        assert all(check.ok for check in checks.values() if check.ok is not None)

    @pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
    def test_bitsandbytes(self, name: str) -> None:
        assert not failures(GOLDEN / name)

    @pytest.mark.parametrize(
        "spelling",
        ["nf4:g64:dq", "int8", "int4:g32:zero", "fp8_e4m3", "fp8_e5m2:b32x32", "mxfp4", "nvfp4", "dynamic8"],
    )
    def test_own_files(self, tmp_path: Path, spelling: str) -> None:
        quantized(tmp_path, FewbitsConfig(spelling))
        checks = verified(tmp_path)
        assert not [check for check in checks.values() if check.ok is False]
        assert checks["codes and scales"].ok
        assert checks["parts"].detail == "3 weights, 2 of them quantized, with all their parts"

    def test_codes_that_spell_nan_are_no_values(self, tmp_path: Path) -> None:
        config = FewbitsConfig({"format": "nf4:g64", "storage_dtype": "bfloat16"}, {"experts": "skip"})
        codes = torch.full((512, 1), -1, dtype=torch.int16).view(torch.bfloat16)
        assert codes.isnan().all()
        quantized(tmp_path, config, fc__weight=codes)
        assert not failures(tmp_path)

    def test_what_other_quantizers_write(self, tmp_path: Path) -> None:
        tensors = {"x.qweight": torch.ones(8, 32, dtype=torch.int32), "x.scales": torch.ones(1, 32)}
        checks = verified(write(tmp_path, tensors, {"quant_method": "gptq"}))
        assert checks["codes and scales"].ok is None
        assert checks["parts"].detail.startswith("1 weights, 1 of them quantized")


class TestValues:
    def test_nan_and_infinity_are_named(self, tmp_path: Path) -> None:
        tensors = {
            "a": with_value(torch.ones(4, 4), NAN, 1, 2),
            "b": torch.ones(3),
            "c": torch.tensor([1, -INF]),
        }
        found = failures(write(tmp_path, tensors))
        assert set(found) == {"values"}
        one, other = found["values"].splitlines()
        assert "tensor a: 1 of 16 values are NaN or infinite, the first at flat index 6" in one
        assert "tensor c: 1 of 2 values" in other

    def test_scales_are_values_too(self, tmp_path: Path) -> None:
        scale = with_value(state("int8")["fc.weight_scale"], NAN, 5)
        found = failures(quantized(tmp_path, FewbitsConfig("int8"), fc__weight_scale=scale))
        assert "tensor fc.weight_scale: 1 of 32 values are NaN" in found["values"]
        assert "fc.weight: 1 of 32 scales are negative or not finite" in found["codes and scales"]

    def test_many_problems_are_counted(self, tmp_path: Path) -> None:
        tensors = {f"t{number:02}": torch.tensor([NAN]) for number in range(30)}
        found = failures(write(tmp_path, tensors))["values"].splitlines()
        assert len(found) == 21
        assert found[-1] == "and 10 more"


CODES = {
    "int8 code of -128": ("int8", {"fc__weight": (-128, 7)}, r"fc.weight: 1 codes have no value in int8:row"),
    "fp8 code of NaN": ("fp8_e4m3", {"fc__weight": (0x7F, 7)}, r"1 codes have no value in fp8_e4m3:row"),
    "fp8 code of -NaN": ("fp8_e4m3", {"fc__weight": (0xFF, 0)}, r"fc.weight: 1 codes have no value"),
    "fp8 code of infinity": ("fp8_e5m2", {"fc__weight": (0x7C, 0)}, r"fc.weight: 1 codes have no value"),
    "code of an expert": (
        "int8",
        {"experts__quantized_up_proj_codes": (-128, 2, 31, 63)},
        r"experts.up_proj[2]: 1 codes have no value in int8:row",
    ),
    "scale below 0": ("int8", {"fc__weight_scale": (-1.0, 3)}, r"fc.weight: 1 of 32 scales are negative"),
    "scale of an expert": (
        "nf4:g64",
        {"experts__quantized_up_proj_scale": (-1.0, 1, 0)},
        r"experts.up_proj[1]: 1 of 32 scales are negative",
    ),
    "power of two that is NaN": ("mxfp4", {"fc__weight_scale": (255, 1, 1)}, r"fc.weight: 1 of 64 scales"),
    "scale's own scale below 0": (
        "nf4:g64:dq",
        {"fc__weight_scale_scale": (-1.0, 0)},
        r"fc.weight, the scales' own: 1 of 1 scales are negative",
    ),
    "scale's own code of NaN": ("nvfp4", {"fc__weight_scale_codes": (0x7F, 0, 0)}, r"1 codes have no value"),
    "coded scale below 0": ("nvfp4", {"fc__weight_scale_codes": (0xB8, 0, 0)}, r"fc.weight: 1 of 128 scales"),
}


class TestCodes:
    @pytest.mark.parametrize("case", CODES)
    def test_out_of_range(self, tmp_path: Path, case: str) -> None:
        spelling, changes, message = CODES[case]
        tensors = state(spelling)
        changed = {
            name: with_value(tensors[name.replace("__", ".")], value, *place)
            for name, (value, *place) in changes.items()
        }
        found = failures(quantized(tmp_path, FewbitsConfig(spelling), **changed))
        assert set(found) == {"codes and scales"}
        assert message in found["codes and scales"]

    def test_bitsandbytes(self, tmp_path: Path) -> None:
        tensors = safetensors.torch.load_file(GOLDEN / "int8" / "model.safetensors")
        first, second = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up"))
        tensors[f"{first}.SCB"][3] = -1
        tensors[f"{second}.weight"][3, 4] = -128
        found = failures(write(tmp_path, tensors, {"quant_method": "bitsandbytes"}))
        assert found["codes and scales"].splitlines() == [
            f"{first}.weight: 1 of 64 scales are negative or not finite; get the file again",
            f"{second}.weight: 1 codes have no value in int8:row; get the file again",
        ]

    def test_another_codebook(self, tmp_path: Path) -> None:
        """Only reading the values tells: sizes are right."""
        tensors = safetensors.torch.load_file(GOLDEN / "nf4" / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight.quant_map"][3] = 0.5
        found = failures(write(tmp_path, tensors, {"quant_method": "bitsandbytes"}))
        assert set(found) == {"codes and scales"}
        assert "up_proj.weight.quant_map holds other values than nf4" in found["codes and scales"]

    def test_one_problem_does_not_hide_another(self, tmp_path: Path) -> None:
        tensors = safetensors.torch.load_file(GOLDEN / "nf4" / "model.safetensors")
        names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
        del tensors[f"{names[0]}.absmax"]
        tensors[f"{names[1]}.absmax"][0] = INF
        tensors[f"{names[2]}.absmax"][0] = -1
        found = failures(write(tmp_path, tensors, {"quant_method": "bitsandbytes"}))
        assert set(found) == {"parts", "values", "codes and scales"}
        assert "down_proj is not a whole bitsandbytes weight" in found["parts"]
        assert "gate_proj.weight.absmax: 1 of 80 values" in found["values"]
        assert "up_proj.weight: 1 of 80 scales" in found["codes and scales"]

    def test_a_config_that_cannot_be_read(self, tmp_path: Path) -> None:
        quantized(tmp_path, FewbitsConfig("nf4:g64"))
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"nf4:g64"', '"nf9"'))
        checks = verified(tmp_path)
        assert checks["parts"].ok is False
        assert "unknown format 'nf9'" in checks["parts"].detail
        assert checks["values"].ok is None


@pytest.fixture
def hashed(tmp_path: Path) -> Path:
    """Two shards, an index and SHA256SUMS."""
    shards = {"model-1.safetensors": {"a": torch.ones(3)}, "model-2.safetensors": {"b": torch.ones(2)}}
    (tmp_path / "config.json").write_text("{}")
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    write_hashes(tmp_path)
    return tmp_path


def write_hashes(path: Path, *skipped: str) -> None:
    names = sorted(entry.name for entry in path.iterdir() if entry.name not in ("SHA256SUMS", *skipped))
    listed = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (path / "SHA256SUMS").write_text("".join(listed))


class TestHashes:
    def test_as_listed(self, hashed: Path) -> None:
        checks = verified(hashed)
        assert (checks["hashes"].ok, checks["hashes"].detail) == (True, "4 files are as SHA256SUMS says")

    def test_changed(self, hashed: Path) -> None:
        safetensors.torch.save_file({"b": torch.zeros(2)}, hashed / "model-2.safetensors")
        (hashed / "config.json").write_text("{} ")
        found = failures(hashed)
        assert set(found) == {"hashes"}
        assert [line.split()[0] for line in found["hashes"].splitlines()] == [
            "config.json",
            "model-2.safetensors",
        ]
        assert "has another SHA-256 than SHA256SUMS lists" in found["hashes"]

    def test_not_listed(self, hashed: Path) -> None:
        write_hashes(hashed, "model-2.safetensors", "config.json")
        assert failures(hashed) == {"hashes": "SHA256SUMS does not list model-2.safetensors"}

    def test_listed_and_missing(self, hashed: Path) -> None:
        (hashed / "extra.txt").write_text("x")
        write_hashes(hashed)
        (hashed / "extra.txt").unlink()
        assert failures(hashed) == {"hashes": "extra.txt is missing; SHA256SUMS lists it"}

    @pytest.mark.parametrize(
        "line",
        [
            "0" * 63 + "  a",
            "0" * 64 + " a",
            "G" * 64 + "  a",
            "0" * 64 + "  ../a",
            "0" * 64 + "  /etc/passwd",
            "0" * 64 + "  sub/a",
            "0" * 64 + "  a\x1b[2J",
            "",
            "anything",
        ],
    )
    def test_odd_lines(self, hashed: Path, line: str) -> None:
        with (hashed / "SHA256SUMS").open("a") as file:
            file.write(line + "\n")
        assert "SHA256SUMS, line 5: " in failures(hashed)["hashes"]

    def test_listed_twice(self, hashed: Path) -> None:
        text = (hashed / "SHA256SUMS").read_text()
        (hashed / "SHA256SUMS").write_text(text + text.splitlines()[0] + "\n")
        assert "line 5: config.json stands there twice" in failures(hashed)["hashes"]

    def test_links_and_pipes(self, hashed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        outside = tmp_path_factory.mktemp("outside") / "a.txt"
        outside.write_text("secret")
        (hashed / "a.txt").symlink_to(outside)
        os.mkfifo(hashed / "pipe")
        with (hashed / "SHA256SUMS").open("a") as file:
            file.write(f"{hashlib.sha256(b'secret').hexdigest()}  a.txt\n{'0' * 64}  pipe\n")
        found = failures(hashed)["hashes"].splitlines()
        assert "a.txt is a link out of its folder" in found[0]
        assert "pipe is not a regular file" in found[1]


class TestStructure:
    def test_every_bad_header_is_listed(self, hashed: Path) -> None:
        for name in ("model-1.safetensors", "model-2.safetensors"):
            os.truncate(hashed / name, (hashed / name).stat().st_size - 1)
        checks = verified(hashed)
        assert len(checks["headers"].detail.splitlines()) == 2
        assert "model-1.safetensors is cut off: 1 of" in checks["headers"].detail
        assert checks["hashes"].ok is False
        assert [checks[name].ok for name in ("tensors", "values", "codes and scales")] == [None] * 3

    def test_an_index_that_differs(self, hashed: Path) -> None:
        (hashed / "SHA256SUMS").unlink()
        places = {"a": "model-1.safetensors", "c": "model-2.safetensors"}
        (hashed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        found = failures(hashed)
        assert set(found) == {"tensors"}
        assert len(found["tensors"].splitlines()) == 2

    def test_a_missing_shard(self, hashed: Path) -> None:
        (hashed / "model-2.safetensors").unlink()
        found = failures(hashed)
        assert "1 of 2 weight files are missing: model-2.safetensors" in found["files"]
        assert "model-2.safetensors is missing" in found["hashes"]

    def test_config_and_files(self, hashed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        moved = tmp_path_factory.mktemp("outside") / "w"
        (hashed / "model-1.safetensors").rename(moved)
        (hashed / "model-1.safetensors").symlink_to(moved)
        (hashed / "config.json").write_text("[")
        (hashed / "SHA256SUMS").unlink()
        found = failures(hashed)
        assert set(found) == {"config", "files"}
        assert "model-1.safetensors is a link out of its folder" in found["files"]

    @pytest.mark.parametrize("case", ["header", "path outside", "pickles"])
    def test_hostile(self, hashed: Path, case: str) -> None:
        change, check, message = HOSTILE[case]
        change(hashed)
        assert message in failures(hashed)[check]


def damage_header(path: Path) -> None:
    content = bytearray((path / "model-1.safetensors").read_bytes())
    content[8:10] = b"[["
    (path / "model-1.safetensors").write_bytes(content)


def point_outside(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../etc/passwd.safetensors"}}'
    )


def put_pipe(path: Path) -> None:
    (path / "model-1.safetensors").unlink()
    os.mkfifo(path / "model-1.safetensors")


def leave_pickles(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name != "config.json":
            entry.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")


HOSTILE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "header": (damage_header, "headers", "does not begin with a brace"),
    "path outside": (point_outside, "files", "only .safetensors files of the folder itself are read"),
    "pipe": (put_pipe, "headers", "model-1.safetensors is not a regular file"),
    "pickles": (leave_pickles, "files", "holds only pickle weights (pytorch_model.bin)"),
}


class TestCommand:
    def test_sound(self, fewbits: Fewbits, demo_model: Path) -> None:
        done = fewbits("verify", demo_model)
        assert (done.returncode, done.stderr) == (0, "")
        shown = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line]
        assert [words[1] for words in shown[1:-1]] == list(CHECKS[:-1])
        assert {words[0] for words in shown[1:]} == {"passed", "skipped"}
        assert max(map(len, done.stdout.splitlines())) <= 100

    def test_json(self, fewbits: Fewbits, demo_model: Path) -> None:
        done = fewbits("verify", demo_model, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert set(found) == {"path", "ok", "checks"}
        assert found["ok"] is True
        assert [check["name"] for check in found["checks"]] == list(CHECKS)
        assert all(set(check) == {"name", "ok", "detail"} for check in found["checks"])

    def test_a_file_cut_off(self, fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        shutil.copytree(demo_model, tmp_path / "m")
        os.truncate(tmp_path / "m" / "model.safetensors", 6_000_000)
        done = fewbits("verify", tmp_path / "m", "--json")
        assert done.returncode == 1
        assert done.stderr == "failed: 1 of 8 checks: headers\n"
        found = json.loads(done.stdout)
        assert found["ok"] is False
        (bad,) = [check for check in found["checks"] if check["ok"] is False]
        assert "model.safetensors is cut off: 562304 of 6562304 bytes are missing" in bad["detail"]

    @pytest.mark.parametrize("case", ["pipe", "pickles"])
    def test_hostile(self, fewbits: Fewbits, hashed: Path, case: str) -> None:
        change, check, message = HOSTILE[case]
        change(hashed)
        done = fewbits("verify", hashed, timeout=120)
        assert done.returncode == 1
        assert check in done.stderr
        assert "Traceback" not in done.stderr
        assert message in " ".join(done.stdout.split())

    def test_no_folder(self, fewbits: Fewbits, tmp_path: Path) -> None:
        done = fewbits("verify", tmp_path / "nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: there is no folder ")
        assert done.stderr.count("\n") == 1

    def test_a_file(self, fewbits: Fewbits, demo_model: Path) -> None:
        done = fewbits("verify", demo_model / "config.json")
        assert done.returncode == 2
        assert "config.json is a file; name the folder of a model" in done.stderr

    def test_help_has_an_example(self, fewbits: Fewbits) -> None:
        done = fewbits("verify", "--help")
        assert done.returncode == 0
        assert "Example: fewbits verify demo/model" in done.stdout

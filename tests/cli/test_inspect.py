"""`fewbits inspect`, run as a user runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fewbits.cli.inspect import inspect
from fewbits.config import FewbitsConfig
from fewbits.model import quantize_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes"
Fewbits = Callable[..., Any]


def lines(text: str) -> list[str]:
    """Without the space of tables."""
    return [re.sub(r"\s{2,}", "  ", line.strip()) for line in text.splitlines() if line.strip()]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 32, 64))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.experts = Experts()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(100, 64)
        self.layers = nn.ModuleList([Layer() for _ in range(11)])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fewbits' own schema with experts and 11 layers."""
    path = tmp_path_factory.mktemp("own")
    config = FewbitsConfig("int4:g32", {"layers.3": "skip", "q_proj": "nf4:g64:dq"})
    model = Model()
    quantize_model(model, config)
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({"model_type": "toy", "quantization_config": config.to_dict()})
    )
    return path


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """inspected(path, tensors=…): what the command prints of a folder, without the start of a process."""

    def run(path: Path, *, tensors: bool = False) -> str:
        inspect(str(path), tensors=tensors)
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


class TestOutput:
    def test_a_plain_checkpoint(self, fewbits: Fewbits, demo_model: Path) -> None:
        done = fewbits("inspect", demo_model)
        assert (done.returncode, done.stderr) == (0, "")
        shown = lines(done.stdout)
        assert (
            shown[0] == "LlamaForCausalLM: 3,279,104 weights in 6.56 MB, 16.00 bits per weight; not quantized"
        )
        assert shown[1] == "In 16 bit it would take 6.56 MB, just as much."
        assert "embedding  BF16  524,288  1.05 MB  16.0 %  16.00" in shown
        assert shown[-1] == "all  3,279,104  6.56 MB  100.0 %  16.00"
        assert max(map(len, done.stdout.splitlines())) <= 100

    def test_bitsandbytes(self, inspected: Callable[..., str]) -> None:
        text = inspected(GOLDEN / "int8")
        shown = lines(text)
        assert shown[0].endswith("bits per weight; bitsandbytes")
        assert any(line.startswith("mlp  int8:row  15,360  16.26 kB") for line in shown)
        assert "lm_head.weight  F16  4.10 kB  output head: kept unless named" in shown
        assert shown[-1] == "Kept with one dimension: 7 tensors, 704 B."

    def test_own_files(self, inspected: Callable[..., str], own: Path) -> None:
        text = inspected(own, tensors=True)
        shown = lines(text)
        assert shown[0].startswith("toy: ")
        assert shown[0].endswith("; fewbits")
        assert 'layers.3.experts.up_proj  F32  32.77 kB  modules["layers.3"]: skip' in shown
        assert "embed_tokens.weight  F32  25.60 kB  embedding: kept unless named" in shown
        assert "layers.0.experts.up_proj  4 x 32 x 64  int4:g32  5.12 kB  5.00" in shown
        assert "layers.0.q_proj.weight  4096 in all  nf4:g64:dq  2.12 kB  4.14" in shown
        order = [line.split()[0] for line in shown if line.startswith("layers.") and "q_proj.bias" in line]
        assert order == [f"layers.{number}.q_proj.bias" for number in range(11)]

    def test_tensors_of_the_same_kind_are_one_row(
        self, inspected: Callable[..., str], tmp_path: Path
    ) -> None:
        tensors = {f"layers.{number}.mystery": torch.ones(8, 8) for number in range(12)}
        tensors |= {"x.weight": torch.ones(8, 8, dtype=torch.int8), "x.SCB": torch.ones(8)}
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        text = inspected(tmp_path)
        assert "12 x layers.*.mystery  F32  3.07 kB  the files do not say" in lines(text)
        assert "layers.11" not in text
        assert lines(text)[0].startswith("unknown architecture: ")

    def test_json(self, fewbits: Fewbits, own: Path) -> None:
        done = fewbits("inspect", own, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        size = sum(info.nbytes for info in safetensors.torch.load_file(own / "model.safetensors").values())
        assert found["bytes"] == size == sum(one["bytes"] for one in found["tensors"])
        assert found["weights"] == 100 * 64 + 11 * (64 * 64 + 64 + 4 * 32 * 64)
        assert found["weights"] == sum(one["weights"] for one in found["roles"])
        assert found["bits_per_weight"] == 8 * size / found["weights"]
        assert found["bytes_in_16_bit"] == 2 * found["weights"]
        assert (found["architecture"], found["method"], found["files"]) == ("toy", "fewbits", 1)
        assert sum(one["share"] for one in found["roles"]) == pytest.approx(1)
        by_name = {one["name"]: one for one in found["tensors"]}
        assert by_name["layers.0.experts.up_proj"] == {
            "name": "layers.0.experts.up_proj",
            "shape": [4, 32, 64],
            "weights": 8192,
            "stored": "int4:g32",
            "bytes": 5120,
            "bits_per_weight": 5.0,
            "role": "experts",
            "quantized": True,
            "reason": "",
            "problem": "",
        }

    def test_damage_is_said(self, inspected: Callable[..., str], own: Path, tmp_path: Path) -> None:
        tensors = safetensors.torch.load_file(own / "model.safetensors")
        del tensors["layers.1.q_proj.weight_scale_codes"]
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((own / "config.json").read_text())
        text = inspected(tmp_path)
        assert "layers.1.q_proj.weight: nf4:g64:dq needs scale_codes too; the checkpoint is" in text


class TestBadUse:
    def test_foreign_names_are_printed_as_they_are(
        self, inspected: Callable[..., str], tmp_path: Path
    ) -> None:
        """No markup, no terminal codes."""
        tensors = {"[red]a[/red].weight": torch.ones(2, 2), "\x1b[31mb.weight": torch.ones(2, 2)}
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architectures": ["[bold]\\u001b[2J"]}')
        text = inspected(tmp_path, tensors=True)
        assert "[red]a[/red].weight" in text
        assert r"'\x1b[31mb.weight'" in text
        assert r"'[bold]\x1b[2J'" in text
        assert "\x1b" not in text

    def test_no_model(self, fewbits: Fewbits, tmp_path: Path) -> None:
        done = fewbits("inspect", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: .* has no config.json; name the folder of a model\n", done.stderr)

    def test_no_argument(self, fewbits: Fewbits) -> None:
        done = fewbits("inspect")
        assert done.returncode == 2
        assert "Missing argument" in done.stderr

    def test_help_has_an_example(self, fewbits: Fewbits) -> None:
        done = fewbits("inspect", "--help")
        assert done.returncode == 0
        assert "Example: fewbits inspect demo/model --tensors" in done.stdout

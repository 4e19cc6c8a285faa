"""`fewbits quantize`, run as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits as library
from fewbits.checkpoint.folder import open_folder

from .conftest import Fewbits, contents, one_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _takeover() -> Iterator[None]:
    library.enable(takeover=True)
    yield
    library.enable()


class TestGoodUse:
    def test_the_default_is_what_bitsandbytes_reads(
        self, fewbits: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        done = fewbits("quantize", demo_model, "small", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "small: 6.56 MB became 2.47 MB in 1 file, 6.03 bits per weight" in done.stdout
        assert "GB/s; a plain copy runs at" in done.stderr
        assert "left behind: train.py" in done.stderr
        assert sorted(contents(tmp_path / "small")) == [
            "README.md",
            "SHA256SUMS",
            "config.json",
            "fewbits.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "bitsandbytes"
        assert config["bnb_4bit_compute_dtype"] == "bfloat16"
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        options = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        expected = transformers.AutoModelForCausalLM.from_pretrained(demo_model, quantization_config=options)
        tokens = torch.arange(1, 30).view(1, -1)
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small")("Once")["input_ids"]

    @pytest.mark.parametrize(
        ("arguments", "stored"),
        [
            (["--int8"], {"int8:row@int8:t6", "bfloat16"}),
            (["--format", "fp4"], {"fp4:g64", "bfloat16"}),
            (["--format", "int4:g128:f16:zero"], {"int4:g128:f16:zero", "bfloat16"}),
            (["--set", "lm_head=int8", "--set", "k_proj=skip"], {"nf4:g64:dq", "int8:row", "bfloat16"}),
        ],
    )
    def test_formats(
        self, arguments: list[str], stored: set[str], inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        done = inside("quantize", demo_model, tmp_path / "out", *arguments, "--quiet", "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        result = json.loads(done.stdout)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        report = library.report(model)
        assert {entry.stored for entry in report.entries} == stored
        assert result["bytes"] == report.nbytes
        assert result["source_bytes"] == 6_558_208

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_config_file(self, whole: bool, inside: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = library.FewbitsConfig("int8:g32", modules={"o_proj": "skip"}).to_dict()
        given = {"model_type": "llama", "quantization_config": options} if whole else options
        (tmp_path / "config.json").write_text(json.dumps(given))
        done = inside("quantize", demo_model, tmp_path / "out", "--config", tmp_path / "config.json")
        assert done.returncode == 0, done.stderr
        assert open_folder(tmp_path / "out").quantization == options

    def test_the_card_and_the_side_file_say_what_was_done(
        self, inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        done = inside("quantize", demo_model, tmp_path / "out", "--base-model", "org/tales")
        assert done.returncode == 0, done.stderr
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.startswith("---\nbase_model: org/tales\nbase_model_relation: quantized\n")
        command = "fewbits quantize --format nf4:g64:dq --max-shard-size 5000000000"
        assert f"{command} --base-model=org/tales model out\n" in card
        other = inside(
            "quantize",
            f"{demo_model}/",
            tmp_path / "b" / "out",
            "--format",
            "nf4:g64:dq",
            "--base-model=org/tales",
        )
        assert other.returncode == 0, other.stderr
        assert contents(tmp_path / "b" / "out") == contents(tmp_path / "out")
        about = json.loads((tmp_path / "out" / "fewbits.json").read_text())
        errors = {entry["name"]: entry["relative_error"] for entry in about["weights"] if entry["quantized"]}
        assert len(errors) == 28
        plain = load_file(demo_model / "model.safetensors")
        name = "model.layers.2.mlp.up_proj.weight"
        decoded = library.quantize(plain[name], "nf4:g64:dq").dequantize().float()
        truth = float((plain[name].float() - decoded).norm() / plain[name].float().norm())
        assert errors[name] == pytest.approx(truth, rel=1e-4)
        kept = {entry["name"]: entry["reason"] for entry in about["weights"] if not entry["quantized"]}
        assert kept["model.embed_tokens.weight"].startswith("tied to")
        assert kept["model.norm.weight"] == "1-dimensional"

    def test_dry_run_writes_nothing(self, inside: Fewbits, source: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        done = inside("quantize", source, "out", "--dry-run", "--max-shard-size", "1MB", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(tmp_path.iterdir()) == before
        for part in (
            "nf4:g64:dq",
            "bfloat16",
            "6.56 MB → 2.47 MB",
            "in 3 files",
            "memory  at most",
            "time    about",
        ):
            assert part in done.stdout
        plan = json.loads(inside("quantize", source, "out", "--dry-run", "--json", cwd=tmp_path).stdout)
        assert plan["estimated_seconds"] > 0
        assert len(plan["weights"]) == 38

    def test_the_hub_cache_is_a_source(self, fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        repository = tmp_path / "hub" / "models--org--tales"
        snapshot = repository / "snapshots" / ("0" * 40)
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model / name, repository / "blobs" / name)
            (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
        before = contents(repository / "blobs")
        environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = fewbits("quantize", "org/tales", "out", "--int8", cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert contents(repository / "blobs") == before
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
        assert "base_model: org/tales" in (tmp_path / "out" / "README.md").read_text()


def poisoned(source: Path, value: float) -> None:
    file = next(
        file
        for file in sorted(source.glob("*.safetensors"))
        if "model.layers.2.mlp.up_proj.weight" in load_file(file)
    )
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--format", "nf5"], "unknown format 'nf5'"),
            (["--format", "nf4", "--int8"], "exclude each other"),
            (["--set", "lm_head"], "is not PATTERN=FORMAT"),
            (["--set", "lm_head=nf5"], "unknown format 'nf5'"),
            (["--set", "a=skip", "--set", "a=nf4"], "a pattern twice"),
            (["--set", "(=nf4"], "no regular expression"),
            (["--config", "nowhere.json"], "nowhere.json"),
            (["--worker", "3/2"], "is not i/N"),
            (["--worker", "0/2"], "is not i/N"),
            (["--max-shard-size", "0"], "at least one byte"),
            (["--set", "k_porj=int8"], "names nothing to quantize in LlamaForCausalLM; did you mean"),
            (["--set", ".*=skip"], "nothing would be quantized"),
        ],
    )
    def test_wrong_arguments(
        self, arguments: list[str], message: str, inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        assert message in one_line(inside("quantize", demo_model, "out", *arguments, cwd=tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_wrong_arguments_in_a_process_of_its_own(
        self, fewbits: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        line = one_line(fewbits("quantize", demo_model, "out", "--format", "nf5", cwd=tmp_path))
        assert line.startswith("error: unknown format 'nf5' in 'nf5': did you mean 'nf4'?")
        done = fewbits("quantize", demo_model, cwd=tmp_path)
        assert done.returncode == 2
        assert "Missing argument 'OUT'" in done.stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "no JSON object"),
            ('{"quant_method": "gptq"}', "quant_method 'gptq'"),
            ('{"load_in_4bit": true, "load_in_5bit": true}', "load_in_5bit"),
            ('{"load_in_4bit": false}', "Set one of the two"),
            ('{"load_in_8bit": true, "llm_int8_has_fp16_weight": true}', "leave it out for int8"),
        ],
    )
    def test_a_config_that_is_none(
        self, content: str, message: str, inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "c.json").write_text(content)
        line = one_line(inside("quantize", demo_model, "out", "--config", "c.json", cwd=tmp_path))
        assert message in line

    def test_a_size_that_is_none(self, inside: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        done = inside("quantize", demo_model, "out", "--max-shard-size", "5 apples", cwd=tmp_path)
        assert done.returncode == 2
        assert "5 apples" in done.stderr

    def test_places_that_would_touch_the_source(self, inside: Fewbits, source: Path, tmp_path: Path) -> None:
        before = contents(source)
        (tmp_path / "link").symlink_to(source)
        for out, message in (
            (source, "never replaced"),
            (source / "inside", "lies in the source"),
            (tmp_path / "link" / "inside", "lies in the source"),
            (tmp_path / "link", "is a link"),
        ):
            assert message in one_line(inside("quantize", source, out, cwd=tmp_path))
        for out, message in (
            (source, "never replaced"),
            (tmp_path / "link", "is a link"),
            (tmp_path, "not what fewbits made"),
            (source / "config.json" / "out", "is a file"),
            (Path("/"), "names no folder"),
        ):
            assert message in one_line(inside("quantize", source, out, "--overwrite", cwd=tmp_path))
        assert contents(source) == before

    @pytest.mark.parametrize("option", ["--overwrite", "--resume", "--worker=1/1"])
    @pytest.mark.parametrize("inner", [".", "deeper"])
    def test_a_source_in_the_place_of_the_work(
        self, option: str, inner: str, inside: Fewbits, source: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "out.partial" / inner
        shutil.copytree(source, place)
        before = contents(place)
        line = one_line(inside("quantize", place, "out", option, cwd=tmp_path))
        assert "choose another place" in line
        assert contents(place) == before

    @pytest.mark.parametrize("option", ["--overwrite", "--resume", "--worker=1/1"])
    def test_a_folder_in_the_way_is_left_alone(
        self, option: str, inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        for name in ("out.partial", "out.replaced"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "precious").write_text("x")
        line = one_line(inside("quantize", demo_model, "out", option, cwd=tmp_path))
        assert "nothing that fewbits left" in line
        assert (tmp_path / "out.partial" / "precious").read_text() == "x"
        shutil.rmtree(tmp_path / "out.partial")
        assert inside("quantize", demo_model, "out", cwd=tmp_path).returncode == 0
        assert inside("quantize", demo_model, "out", "--overwrite", cwd=tmp_path).returncode == 0
        assert (tmp_path / "out.replaced" / "precious").read_text() == "x"

    def test_a_project_is_not_taken_for_a_model(
        self, inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        project = tmp_path / "project"
        (project / "src").mkdir(parents=True)
        for name in ("fewbits.json", "config.json", "model.safetensors", "src/thesis.tex"):
            (project / name).write_text("{}")
        line = one_line(inside("quantize", demo_model, "project", "--overwrite", cwd=tmp_path))
        assert "never replaced" in line
        assert (project / "src" / "thesis.tex").exists()
        original = shutil.copytree(demo_model, tmp_path / "original")
        assert "never replaced" in one_line(
            inside("quantize", demo_model, original, "--overwrite", cwd=tmp_path)
        )

    def test_an_existing_result_is_replaced_only_on_request(
        self, inside: Fewbits, demo_model: Path, tmp_path: Path
    ) -> None:
        assert inside("quantize", demo_model, "out", cwd=tmp_path).returncode == 0
        before = contents(tmp_path / "out")
        line = one_line(inside("quantize", demo_model, "out", "--int8", cwd=tmp_path))
        assert "--overwrite replaces it" in line
        assert contents(tmp_path / "out") == before
        assert inside("quantize", demo_model, "out", "--int8", "--overwrite", cwd=tmp_path).returncode == 0
        assert (open_folder(tmp_path / "out").quantization or {})["load_in_8bit"] is True
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_infinity_are_found_before_anything_is_written(
        self, value: float, inside: Fewbits, source: Path, tmp_path: Path
    ) -> None:
        poisoned(source, value)
        line = one_line(inside("quantize", source, "out", "--max-shard-size", "500kB", cwd=tmp_path))
        assert "tensor model.layers.2.mlp.up_proj.weight: 1 of 163840 values are NaN or infinite" in line
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_truncated_file(self, fewbits: Fewbits, source: Path, tmp_path: Path) -> None:
        file = sorted(source.glob("*.safetensors"))[1]
        os.truncate(file, file.stat().st_size - 1)
        line = one_line(fewbits("quantize", source, "out", cwd=tmp_path))
        assert f"{file.name} is cut off: 1 of" in line
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_quantized_checkpoint(self, inside: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        assert inside("quantize", demo_model, "out", cwd=tmp_path).returncode == 0
        assert "quantized already (bitsandbytes)" in one_line(
            inside("quantize", "out", "again", cwd=tmp_path)
        )

    def test_pickled_weights(self, inside: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        folder = tmp_path / "pickled"
        folder.mkdir()
        shutil.copy(demo_model / "config.json", folder)
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        line = one_line(inside("quantize", folder, "out", cwd=tmp_path))
        assert "pytorch_model.bin" in line
        assert "can run code" in line

    def test_no_such_source(self, fewbits: Fewbits, inside: Fewbits, tmp_path: Path) -> None:
        assert "there is no folder nowhere" in one_line(inside("quantize", "nowhere", "out", cwd=tmp_path))
        environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        line = one_line(fewbits("quantize", "org/nowhere", "out", cwd=tmp_path, env=environment))
        assert "org/nowhere is neither a folder here nor a model that the hub gives" in line


def test_help_shows_an_example(inside: Fewbits) -> None:
    for command in ("quantize", "finalize"):
        done = inside(command, "--help")
        assert done.returncode == 0
        assert "Example: fewbits " in done.stdout


def test_starting_loads_no_heavy_package() -> None:
    """What `fewbits --help`, a wrong argument and shell completion wait for."""
    script = (
        "import sys, fewbits.cli\n"
        "print(sorted({'transformers', 'accelerate', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"

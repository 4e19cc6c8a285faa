"""`fewbits plan`: run as a user runs it, and what it says held to what loading gives."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits as library
from fewbits.cli.plan_code import code, command
from fewbits.cli.plan_methods import EMBEDDING_FORMAT, Case, Source, mends
from fewbits.planner import Device, best

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes"
GENERATE, TRAIN = Case(128, 1, None), Case(128, 2, 8)
Fewbits = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _takeover() -> Iterator[None]:
    library.enable(takeover=True)
    yield
    library.enable()


@pytest.fixture(scope="module")
def source(demo_model: Path) -> Source:
    return Source(demo_model)


@pytest.fixture(scope="module")
def report(fewbits: Fewbits, demo_model: Path) -> dict[str, Any]:
    done = fewbits("plan", demo_model, "--memory", "24GiB", "--context", 100, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def only_config(folder: Path, **changes: object) -> Path:
    """A folder with nothing but the config of a small Llama, changed so."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


class TestJson:
    def test_the_question_is_repeated(self, report: dict[str, Any]) -> None:
        assert report["architecture"] == "LlamaForCausalLM"
        assert report["parameters"] == 3_279_104
        assert (report["dtype"], report["context"], report["batch"]) == ("bfloat16", 100, 1)
        assert report["train"] is None
        assert report["devices"][0]["name"] == "24GiB"
        assert report["devices"][0]["bytes"] == 24 * 2**30

    def test_every_method_has_its_parts(self, report: dict[str, Any]) -> None:
        keys = [method["method"] for method in report["methods"]]
        assert keys == ["stored", "int8", "nf4", "nf4-dq", "nf4-dq-embeddings", "int3-embeddings"]
        for method in report["methods"]:
            parts = [method[part] for part in ("weights", "cache", "activations", "adapters")]
            assert method["running"] == sum(parts)
            assert method["cache"] == 4 * 2 * 2 * 64 * 2 * 100
            assert method["loading"] >= method["weights"]
            assert method["fits"] == {"24GiB": "yes"}
        bits = [method["bits_per_weight"] for method in report["methods"]]
        assert bits == sorted(bits, reverse=True)

    def test_all_fits_so_nothing_is_given_up(self, report: dict[str, Any]) -> None:
        assert report["recommended"]["method"] == "stored"
        assert report["recommended"]["command"].startswith("fewbits generate ")
        assert report["mends"] == []
        assert any("within 15 %" in note for note in report["notes"])


class TestText:
    def test_the_table_the_reason_the_code_and_the_command(self, fewbits: Fewbits, tmp_path: Path) -> None:
        wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
        folder = only_config(tmp_path, **wide, num_attention_heads=32, num_key_value_heads=32)
        done = fewbits("plan", folder, "--memory", "8GiB", "--context", "4096")
        assert done.returncode == 0, done.stderr
        assert "6,738,415,616 parameters in bfloat16" in done.stdout
        rows = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines()}
        assert rows["bfloat16, as stored"][3:5] == ["13.48", "GB"]
        assert rows["bfloat16, as stored"][-1] == "no"
        assert rows["NF4"][-1] == "yes"
        assert "2.15 GB" in " ".join(rows["NF4"])
        assert "config.json" in done.stdout
        assert "model.embed_tokens.weight" in done.stdout
        assert "Recommended: NF4. The closest to the original that fits 8GiB with room to spare" in " ".join(
            done.stdout.split()
        )
        assert "bnb_4bit_compute_dtype=torch.bfloat16" in done.stdout
        assert f"Next: fewbits quantize {folder}" in done.stdout.replace("\n", " ")
        assert max(len(line) for line in done.stdout.splitlines()[:30]) <= 100

    def test_nothing_fits(self, fewbits: Fewbits, demo_model: Path) -> None:
        done = fewbits("plan", demo_model, "--memory", "501MB", "--batch", "2")
        assert done.returncode == 1
        assert "Nothing fits 501MB. What would help:" in done.stdout
        assert done.stderr.startswith("failed: nothing fits 501MB: need ")
        assert "500.00 MB for Python" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_this_machine(self, inside: Fewbits, demo_model: Path) -> None:
        done = inside("plan", demo_model, "--train", "lora")
        assert done.returncode == 0, done.stderr
        assert "training LoRA adapters of rank 16 on 1 x 256 tokens" in done.stdout
        assert "this CPU with" in done.stdout
        assert "get_peft_model" in done.stdout


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("--memory", "much"), "'much' is no size"),
            (("--context", "0"), "--context"),
            (("--train", "everything"), "--train"),
        ],
    )
    def test_wrong_arguments(
        self, inside: Fewbits, demo_model: Path, arguments: tuple[str, ...], told: str
    ) -> None:
        done = inside("plan", demo_model, *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert told in done.stderr
        assert "Traceback" not in done.stderr

    def test_no_folder(self, inside: Fewbits, tmp_path: Path) -> None:
        done = inside("plan", tmp_path / "nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: there is no folder ")

    @pytest.mark.parametrize(
        ("config", "told"),
        [
            ("{", "config.json"),
            ('{"model_type": "no such"}', "no such"),
            ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": -4}', "llama"),
        ],
    )
    def test_a_broken_config(self, inside: Fewbits, tmp_path: Path, config: str, told: str) -> None:
        (tmp_path / "config.json").write_text(config)
        done = inside("plan", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1

    def test_a_broken_header(self, fewbits: Fewbits, tmp_path: Path, demo_model: Path) -> None:
        shutil.copy(demo_model / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"{}")
        done = fewbits("plan", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "model.safetensors" in done.stderr


class TestWeights:
    @pytest.mark.parametrize("position", range(6))
    def test_to_the_byte_what_loading_gives(self, position: int, source: Source, demo_model: Path) -> None:
        row = source.rows(GENERATE)[position]
        options: dict[str, Any] = {}
        if row.method.format is not None:
            modules = dict.fromkeys(row.embeddings, EMBEDDING_FORMAT)
            options["quantization_config"] = library.FewbitsConfig(row.method.format, modules)
        model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, **options)
        assert row.estimate.weights == model.get_memory_footprint()
        kept = {entry.name: entry.nbytes for entry in library.report(model).kept}
        assert {entry.name: entry.nbytes for entry in row.kept} == kept

    def test_a_float32_model_may_be_cast(self, tmp_path: Path) -> None:
        rows = {row.method.key: row for row in Source(only_config(tmp_path, dtype="float32")).rows(GENERATE)}
        assert list(rows)[:3] == ["stored", "bfloat16", "int8"]
        stored, cast = rows["stored"].estimate, rows["bfloat16"].estimate
        assert stored.weights == pytest.approx(2 * cast.weights, rel=0.01)
        assert stored.cache == 2 * (cast.cache or 0)

    def test_embeddings_that_cannot_be_quantized_are_not_promised(self, tmp_path: Path) -> None:
        """Gemma scales what it looks up, in a class of its own."""
        config = only_config(
            tmp_path, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], head_dim=16
        )
        rows = {row.method.key: row for row in Source(config).rows(GENERATE)}
        assert "nf4-dq-embeddings" not in rows
        assert rows["int3-embeddings"].label == "int3"

    def test_a_config_without_dtype_is_told(self, tmp_path: Path) -> None:
        source = Source(only_config(tmp_path, dtype=None))
        assert source.dtype == "bfloat16"
        assert any("names no dtype" in note for note in source.notes)

    def test_an_encoder_with_a_decoder_is_planned_as_far_as_it_goes(self, tmp_path: Path) -> None:
        t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 1}
        source = Source(only_config(tmp_path, **t5))
        rows = source.rows(GENERATE)
        assert all(row.estimate.running is None for row in rows)
        assert any("encoder" in note for note in source.notes)
        assert "T5ForConditionalGeneration.from_pretrained" in code("t5", rows[0], source, GENERATE)
        assert command("t5", rows[0], source) == "fewbits inspect t5"


class TestQuantizedAlready:
    @pytest.mark.parametrize("name", ["nf4", "nf4_double", "int8"])
    def test_it_is_planned_as_it_is(self, name: str) -> None:
        source = Source(GOLDEN / name)
        (row,) = source.rows(GENERATE)
        model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
        assert row.estimate.weights == row.estimate.loading == model.get_memory_footprint()
        assert row.estimate.running is not None
        assert any("bitsandbytes" in note for note in source.notes)
        assert "BitsAndBytesConfig" not in code("x", row, source, GENERATE)
        assert "fewbits.enable(takeover=True)" in code("x", row, source, GENERATE)

    def test_by_another_method_it_is_counted_from_the_headers(self, tmp_path: Path, demo_model: Path) -> None:
        shutil.copytree(demo_model, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        source = Source(tmp_path)
        (row,) = source.rows(GENERATE)
        assert source.folder is not None
        assert row.estimate.weights == source.folder.nbytes
        assert any("gptq" in note for note in source.notes)

    def test_the_command(self, inside: Fewbits) -> None:
        done = inside("plan", GOLDEN / "nf4", "--memory", "2GB")
        assert done.returncode == 0, done.stderr
        assert "quantized already, by bitsandbytes" in done.stdout


class TestMends:
    def test_a_smaller_batch_then_a_smaller_context(self, tmp_path: Path) -> None:
        source, case = Source(only_config(tmp_path)), Case(32768, 4, None)
        rows = source.rows(case)
        smaller = min(row.estimate.needed for row in source.rows(Case(32768, 1, None)))
        device = Device("x", 500_000_000 + smaller)
        assert best([row.estimate for row in rows], device) is None
        assert any(mend.startswith("--batch 1:") for mend in mends(source, rows, case, [device]))
        tighter = Device("x", 500_000_000 + smaller // 3)
        assert any(mend.startswith("--batch 1 --context ") for mend in mends(source, rows, case, [tighter]))

    def test_another_device(self, source: Source) -> None:
        rows = source.rows(GENERATE)
        devices = [Device("small", 0), Device("this CPU", 10**11)]
        assert "this CPU" in mends(source, rows, GENERATE, devices)[0]

    def test_the_size_that_is_named_fits(self, source: Source) -> None:
        rows = source.rows(GENERATE)
        least = min(row.estimate.least_device for row in rows)
        assert best([row.estimate for row in rows], Device("x", least)) is not None
        assert 1 <= len(mends(source, rows, GENERATE, [Device("x", 0)])) <= 3


class TestCode:
    @pytest.mark.parametrize("position", range(6))
    def test_it_runs(self, position: int, source: Source, demo_model: Path) -> None:
        row = source.rows(GENERATE)[position]
        scope: dict[str, Any] = {}
        exec(code(str(demo_model), row, source, GENERATE), scope)
        assert scope["model"].get_memory_footprint() == row.estimate.weights
        assert scope["tokenizer"]("Once").input_ids

    def test_it_trains(self, source: Source, demo_model: Path) -> None:
        pytest.importorskip("peft")
        row = next(row for row in source.rows(TRAIN) if row.method.key == "nf4-dq")
        scope: dict[str, Any] = {}
        exec(code(str(demo_model), row, source, TRAIN), scope)
        trained = sum(one.numel() for one in scope["model"].parameters() if one.requires_grad)
        assert row.estimate.adapters == 16 * trained
        ids = torch.ones(1, 8, dtype=torch.long)
        scope["model"].train()(input_ids=ids, labels=ids).loss.backward()

    def test_a_path_with_quotes_stays_a_string(self, source: Source) -> None:
        row = source.rows(GENERATE)[0]
        path = 'a"b\\c'
        compile(code(path, row, source, GENERATE), "code", "exec")
        assert shlex.split(command("it's", row, source))[2] == "it's"

    def test_the_command_quantizes(self, source: Source, fewbits: Fewbits, demo_model: Path) -> None:
        row = next(row for row in source.rows(GENERATE) if row.method.key == "int3-embeddings")
        words = shlex.split(command(str(demo_model), row, source))
        done = fewbits(*words[1:], "--dry-run", "--json")
        assert done.returncode == 0, done.stderr

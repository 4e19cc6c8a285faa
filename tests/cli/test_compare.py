"""`fewbits compare`: what it refuses, what it measures, what it concludes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

import fewbits as library
from fewbits.cli.measure import Job, measure, run_worker
from fewbits.cli.measure_inputs import check_subjects, text_sequences
from fewbits.cli.measured import Comparison, Figures, Plan, Row, Subject, millinats, worst_weights
from fewbits.evaluate import Quality

transformers = pytest.importorskip("transformers")

Fewbits = Callable[..., CompletedProcess[str]]
SMALL = ("--samples", "4", "--tokens", "32", "--threads", "1")
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play in the park. " * 20


@pytest.fixture(scope="module")
def nf4(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in NF4, saved without its tokenizer."""
    library.enable(takeover=True)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, quantization_config=config)
    folder = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(folder)
    library.enable()
    return folder


@pytest.fixture
def copy(demo_model: Path, tmp_path: Path) -> Path:
    """A copy of the demo model to spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(demo_model, folder)
    return folder


def subject(folder: Path, label: str = "") -> Subject:
    name = label or folder.name
    return Subject(name, name, str(folder), str(folder))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- as a process: good use -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of `report` writes its page."""
    return tmp_path_factory.mktemp("page") / "page.html"


@pytest.fixture(scope="module")
def report(fewbits: Fewbits, demo_model: Path, nf4: Path, page: Path) -> dict[str, Any]:
    done = fewbits("compare", demo_model, nf4, *SMALL, "--json", "--quiet", "--html", page)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


@pytest.mark.slow
class TestTwoModels:
    """One run in JSON, with everything it can write."""

    def test_what_was_done_is_said(self, report: dict[str, Any], demo_model: Path, nf4: Path) -> None:
        assert set(report) == {
            *("versions", "cpu", "cpus", "memory_bytes", "threads", "command", "model", "parameters"),
            *(
                "text",
                "text_sha256",
                "samples",
                "tokens",
                "seed",
                "batch",
                "prompt",
                "verdict",
                "notes",
                "rows",
            ),
        }
        assert report["command"].startswith(f"fewbits compare {demo_model} {nf4} --samples 4")
        assert [row["label"] for row in report["rows"]] == ["model", "small"]
        assert [row["model"] for row in report["rows"]] == [str(demo_model), str(nf4)]
        assert report["text"] is None

    def test_the_reference(self, report: dict[str, Any]) -> None:
        row = report["rows"][0]
        assert row["bits_per_weight"] == pytest.approx(16, abs=0.01)
        assert row["quality"]["kl_mean"] == 0.0
        assert row["quality"]["same_top_share"] == 1.0
        assert row["weight_errors"] == {}
        assert row["stored"] == {"bfloat16": 38}
        assert row["kept_bytes"] == 2 * row["parameters"]

    def test_the_quantized_model(self, report: dict[str, Any]) -> None:
        row, reference = report["rows"][1], report["rows"][0]
        assert row["stored"] == {"nf4:g64": 28, "bfloat16": 10}
        assert row["parameters"] == reference["parameters"]
        assert row["size_ratio"] == row["weight_bytes"] / reference["weight_bytes"]
        assert 0.35 < row["size_ratio"] < 0.45
        assert 0.001 < row["quality"]["kl_mean"] < 0.1
        assert row["quality"]["tokens"] == 4 * 31
        assert len(row["weight_errors"]) == 38
        name, error = row["worst_weight"]
        assert error == max(row["weight_errors"].values()) == row["weight_errors"][f"{name}.weight"]
        assert 0.05 < error < 0.15
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] > 0

    def test_the_verdict_is_made_of_the_figures(self, report: dict[str, Any]) -> None:
        row = report["rows"][1]
        assert report["verdict"].startswith(f"small keeps {100 * row['quality']['same_top_share']:.1f} % of")
        assert f"at {row['size_ratio']:.2f} × the size" in report["verdict"]
        assert f"KL {1e3 * row['quality']['kl_mean']:.2f} ± " in report["verdict"]
        assert f"worst layer {row['worst_weight'][0]} " in report["verdict"]

    def test_files_are_identified(self, report: dict[str, Any]) -> None:
        for row in report["rows"]:
            assert set(row["files"]) == {"config.json", "header of model.safetensors"}
            assert all(len(digest) == 64 for digest in row["files"].values())

    def test_the_page(self, report: dict[str, Any], page: Path) -> None:
        text = page.read_text(encoding="utf-8")
        assert f"fewbits compare {report['model']}" in text
        assert 'id="size-quality"' in text
        assert 'id="layer-errors"' in text


@pytest.mark.slow
def test_a_text_a_table_and_a_limit(fewbits: Fewbits, demo_model: Path, nf4: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    limit = ("--max-kl", "0.001", "--threads", "1")
    done = fewbits("compare", demo_model, nf4, "--text", text, "--tokens", "32", *limit)
    assert done.returncode == 1
    assert done.stderr.startswith("failed: KL divergence from model above 0.001 millinats/token: small has ")
    assert done.stderr.count("\n") == 1
    lines = done.stdout.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert any(line.split()[0:1] == ["small"] and " ± " in line for line in lines)
    assert text.name in done.stdout.replace("\n", "")
    assert "small keeps " in done.stdout


@pytest.mark.slow
def test_a_broken_checkpoint_names_the_model(fewbits: Fewbits, demo_model: Path, copy: Path) -> None:
    edit_config(copy, num_hidden_layers=5)
    done = fewbits("compare", demo_model, copy, *SMALL, "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith("error: copy: 9 weights are missing")
    assert done.stderr.count("\n") == 1


# --- as a process: refused before anything is measured ----------------------------------------------


def test_one_model_is_not_enough(fewbits: Fewbits, demo_model: Path) -> None:
    done = fewbits("compare", demo_model)
    assert done.returncode == 2
    assert "at least two models" in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_a_missing_folder(fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
    done = fewbits("compare", demo_model, tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: there is no folder {tmp_path}/nowhere; name the folder of a model, or a model id\n"
    )


def test_a_file_cut_off(fewbits: Fewbits, demo_model: Path, copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    done = fewbits("compare", demo_model, copy)
    assert done.returncode == 2
    assert done.stderr.startswith("error: copy: model.safetensors is cut off")
    assert done.stderr.count("\n") == 1


def test_help_has_an_example(fewbits: Fewbits) -> None:
    done = fewbits("compare", "--help")
    assert done.returncode == 0
    assert "Example: fewbits compare demo/model nf4 int8 --html compare.html" in done.stdout


def test_a_page_needs_its_packages(fewbits: Fewbits, demo_model: Path, nf4: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "matplotlib.py").write_text("raise ImportError('none here', name='matplotlib')")
    page = tmp_path / "page.html"
    done = fewbits("compare", demo_model, nf4, "--html", page, env={"PYTHONPATH": f"{SOURCE}:{absent}"})
    assert done.returncode == 2
    assert "matplotlib is not installed; pip install 'fewbits[report]'" in done.stderr
    assert not page.exists()


SOURCE = Path(library.__file__).resolve().parents[1]


# --- what is checked before measuring ---------------------------------------------------------------


def check(*folders: Path, tokens: int = 32, sampled: bool = True) -> None:
    check_subjects([subject(folder) for folder in folders], tokens=tokens, sampled=sampled)


def test_models_that_fit(demo_model: Path, nf4: Path, copy: Path) -> None:
    check(demo_model, nf4, copy)


def test_vocabularies_of_different_size(demo_model: Path, copy: Path) -> None:
    edit_config(copy, vocab_size=2047)
    with pytest.raises(ValueError, match="model has a vocabulary of 2048 tokens and copy one of 2047"):
        check(demo_model, copy)


def test_different_tokenizers(demo_model: Path, copy: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = [token for token, index in vocabulary.items() if index in (300, 301)]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match="model and copy have different tokenizers: 2 tokens are"):
        check(demo_model, copy)


def test_a_config_of_wrong_types(demo_model: Path, copy: Path) -> None:
    edit_config(copy, num_hidden_layers="four")
    with pytest.raises(ValueError, match=r"copy: .*num_hidden_layers"):
        check(demo_model, copy)


def test_only_pickles(demo_model: Path, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"copy: .* has no safetensors file; pickled weights are not read"):
        check(demo_model, copy)


def test_sequences_longer_than_a_model_takes(demo_model: Path, nf4: Path) -> None:
    check(demo_model, nf4, tokens=256)
    with pytest.raises(ValueError, match="model takes at most 256 tokens; got --tokens 257"):
        check(demo_model, nf4, tokens=257)


def test_sampling_needs_a_begin_token_and_a_text_does_not(copy: Path, nf4: Path) -> None:
    edit_config(copy, bos_token_id=None)
    check(copy, nf4, sampled=False)
    with pytest.raises(ValueError, match=r"copy has no begin token .* --text FILE"):
        check(copy, nf4)


# --- texts ------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_sequences(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    lead = tokenizer("").input_ids
    rows = text_sequences(subject(demo_model), path, tokens=16, count=None)
    piece = 16 - len(lead)
    assert rows.shape == (len(ids) // piece, 16)
    assert rows[:, len(lead) :].flatten().tolist() == ids[: len(rows) * piece]
    assert all(row[: len(lead)].tolist() == lead for row in rows)
    few = text_sequences(subject(demo_model), path, tokens=16, count=3)
    assert torch.equal(few, rows[:3])


def test_each_sequence_has_the_begin_token_of_the_tokenizer(copy: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    rows = text_sequences(subject(copy), path, tokens=16, count=None)
    ids = transformers.AutoTokenizer.from_pretrained(copy)(TEXT, add_special_tokens=False).input_ids
    assert (rows[:, 0] == 0).all()
    assert rows[:, 1:].flatten().tolist() == ids[: len(rows) * 15]


def test_a_short_text_is_refused(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text.txt gives \d+ tokens, and two sequences of 128 need 25\d"):
        text_sequences(subject(demo_model), path, tokens=128, count=None)


def test_a_text_that_is_none_is_refused(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"good \xff bad")
    with pytest.raises(ValueError, match=r"text.txt is no UTF-8 text: .* at byte 5"):
        text_sequences(subject(demo_model), path, tokens=8, count=None)


def test_a_text_needs_a_tokenizer(nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="small has no tokenizer, which --text needs"):
        text_sequences(subject(nf4), tmp_path / "text.txt", tokens=8, count=None)


# --- workers ----------------------------------------------------------------------------------------


PLAN = Plan(count=2, tokens=8, seed=0, threads=1, batch=8)


def test_an_interrupt_leaves_no_worker_behind(demo_model: Path, tmp_path: Path) -> None:
    job = Job(subject(demo_model), subject(demo_model), PLAN, str(tmp_path))
    workers: list[psutil.Process] = []

    def interrupt(_text: str, _share: float) -> None:
        workers.extend(psutil.Process().children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(job, interrupt)
    assert len(workers) == 1
    assert not workers[0].is_running()


@pytest.mark.slow
def test_models_of_other_shape_are_compared_without_weight_errors(demo_model: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(demo_model, num_hidden_layers=2)
    small = transformers.AutoModelForCausalLM.from_config(config)
    small.save_pretrained(tmp_path / "half")
    save_file({"tokens": torch.randint(2048, (2, 8))}, tmp_path / "sequences.safetensors")
    subjects = [subject(demo_model), subject(tmp_path / "half")]
    rows = measure(subjects, PLAN, tmp_path, quiet=True)
    assert rows[1].figures.weight_errors is None
    assert "one architecture" in rows[1].figures.weight_note
    assert rows[1].figures.parameters < rows[0].figures.parameters
    assert rows[1].figures.quality.kl_mean > 0.1
    assert any("half: no weight errors" in note for note in Comparison(rows, PLAN, "").to_json()["notes"])


# --- what is concluded ------------------------------------------------------------------------------

QUALITY = Quality(12.6, 0.01248, 0.00055, 0.00885, 0.0757, 0.196, 0.922, 4064)
FIGURES = Figures(
    weight_bytes=2_470_000,
    kept_bytes=1_050_000,
    bits_per_weight=6.03,
    parameters=3_279_104,
    dtype="bfloat16",
    stored={"nf4:g64": 28},
    quality=QUALITY,
    weight_errors={"a.weight": 0.12, "b.weight": 0.0, "c.weight": 0.1},
    weight_note="",
    tokens_per_second=50.0,
    decoded_tokens=32,
    decode_repeats=3,
    peak_bytes=27_000_000,
    peak_is_exact=True,
    text=None,
)
SAME = replace(
    QUALITY, kl_mean=0.0, kl_interval95=0.0, kl_median=0.0, kl_p99=0.0, kl_max=0.0, same_top_share=1.0
)


def row(label: str, size: int = 2_470_000, quality: Quality = QUALITY, **errors: float) -> Row:
    found = {"weight_errors": {f"{name}.weight": error for name, error in errors.items()}}
    figures = replace(FIGURES, weight_bytes=size, quality=quality, **(found if errors else {}))
    return Row(Subject(label, label, label, label), figures, {})


def compared(*others: Row) -> Comparison:
    return Comparison((row("full", 6_500_000, SAME), *others), PLAN, "fewbits compare")


def test_the_verdict_on_one_model() -> None:
    assert compared(row("nf4")).verdict == (
        "nf4 keeps 92.2 % of the top tokens at 0.38 × the size, KL 12.48 ± 0.55 millinats/token; "
        "worst layer a (relative error 0.120)."
    )


def test_the_verdict_on_several() -> None:
    quality = replace(QUALITY, kl_mean=0.00041, kl_interval95=0.00002, same_top_share=0.985)
    assert compared(row("nf4"), row("int8", 3_900_000, quality)).verdict == (
        "int8 is closest: it keeps 98.5 % of the top tokens at 0.60 × the size, KL 0.41 ± 0.02 "
        "millinats/token; nf4 is smallest: it keeps 92.2 % of the top tokens at 0.38 × the size, KL 12.48 "
        "± 0.55 millinats/token."
    )


def test_the_verdict_when_the_closest_is_the_smallest() -> None:
    far = row("fp4", 3_000_000, replace(QUALITY, kl_mean=0.02))
    assert compared(far, row("nf4")).verdict.startswith("nf4 is closest and smallest: it keeps 92.2 %")


def test_the_verdict_on_equals_and_on_broken_models() -> None:
    assert compared(row("copy", 6_500_000, SAME)).verdict.startswith(
        "copy predicts the same as full on all tokens at 1.00 × the size"
    )
    broken = row("broken", quality=replace(QUALITY, kl_mean=math.nan))
    assert compared(broken).verdict.startswith("broken is broken, its KL divergence being nan, at 0.38 ×")
    assert compared(broken, row("nf4", 3_000_000)).verdict.startswith("nf4 is closest")


def test_worst_weights_are_ranked() -> None:
    assert worst_weights(row("nf4"), 5) == [("a", 0.12), ("c", 0.1)]
    assert worst_weights(row("nf4", x=0.5, y=math.nan, z=0.1), 2)[1] == ("x", 0.5)
    assert row("same", x=0.0).worst_weight is None


def test_divergences_as_text() -> None:
    assert millinats(QUALITY) == "12.48 ± 0.55"
    assert millinats(replace(QUALITY, kl_mean=4e-6, kl_interval95=1e-7)) == "0.0040 ± 0.0001"
    assert millinats(replace(QUALITY, kl_mean=math.inf, kl_interval95=math.nan)) == "inf"

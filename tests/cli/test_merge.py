"""`fewbits merge`: which base it takes and why, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbits import FewbitsConfig
from fewbits.checkpoint.adapter import open_adapter
from fewbits.cli import merge_bases
from fewbits.cli.merge_choice import Trial, decide
from fewbits.integrations.merge_files import merge_adapter

from .conftest import contents, one_line

RANK = 2
ONCE = ("--samples", "4", "--tokens", "16")


def new_adapter(path: Path, base: Path, *, size: float = 0.02, **settings: object) -> Path:
    """An adapter of the attention of a Llama model, with random values."""
    path.mkdir()
    torch.manual_seed(3)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, weight.shape[1])
            tensors[f"{module}.lora_B.weight"] = size * torch.randn(weight.shape[0], RANK)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def adapter(demo_model: Path, tmp_path: Path) -> Path:
    return new_adapter(tmp_path / "adapter", demo_model)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def words(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def delta(adapter: Path, name: str) -> Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return 2 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


Q = "model.layers.1.self_attn.q_proj.weight"


class TestResult:
    def test_the_original_weights(self, inside, demo_model, adapter, tmp_path):
        done = inside("merge", demo_model, adapter, tmp_path / "out", "--base", "original")
        assert done.returncode == 0, done.stderr
        assert "merged into the original weights of model; 8 of 38 tensors changed" in words(done.stdout)
        found, base = tensors_of(tmp_path / "out"), tensors_of(demo_model)
        assert found.keys() == base.keys()
        assert torch.equal(found[Q], (base[Q].float() + delta(adapter, Q)).bfloat16())
        same = {name for name in base if torch.equal(found[name], base[name])}
        assert same == {name for name in base if not name.endswith(("q_proj.weight", "v_proj.weight"))}

    def test_the_decoded_weights(self, inside, demo_model, adapter, tmp_path):
        options = ("--base", "dequantized", "--format", "int4:g32")
        done = inside("merge", demo_model, adapter, tmp_path / "out", *options)
        assert done.returncode == 0, done.stderr
        assert "the weights of model, quantized to int4:g32 and decoded" in words(done.stdout)
        load = transformers.AutoModelForCausalLM.from_pretrained
        plain = load(demo_model, quantization_config=FewbitsConfig("int4:g32")).dequantize().state_dict()
        wanted = (plain[Q].float() + delta(adapter, Q)).bfloat16()
        assert torch.equal(tensors_of(tmp_path / "out")[Q], wanted)

    def test_a_quantized_base_is_decoded(self, inside, demo_model, adapter, tmp_path):
        assert inside("quantize", demo_model, tmp_path / "nf4").returncode == 0
        assert inside("merge", tmp_path / "nf4", adapter, tmp_path / "one").returncode == 0
        options = ("--base", "dequantized", "--quantized", tmp_path / "nf4")
        assert inside("merge", demo_model, adapter, tmp_path / "two", *options).returncode == 0
        assert (
            inside("merge", demo_model, adapter, tmp_path / "three", "--base", "dequantized").returncode == 0
        )
        weights = {(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two", "three")}
        assert len(weights) == 1
        assert "quantization_config" not in json.loads((tmp_path / "one" / "config.json").read_text())

    def test_it_is_a_plain_checkpoint(self, inside, demo_model, adapter, tmp_path):
        out = tmp_path / "out"
        options = ("--base", "original", "--max-shard-size", "2MB", "--base-model", "org/base", "--json")
        done = inside("merge", demo_model, adapter, out, *options)
        said = json.loads(done.stdout)
        assert (said["base"], said["changed"], said["tensors"], said["comparison"]) == (
            "original",
            8,
            38,
            None,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == torch.bfloat16
        transformers.AutoTokenizer.from_pretrained(out)
        assert (out / "model.safetensors.index.json").exists()
        card = (out / "README.md").read_text()
        assert "base_model: org/base" in card
        assert "base_model_relation: finetune" in card
        assert str(tmp_path) not in card
        assert inside("verify", out).returncode == 0
        side = json.loads((out / "fewbits.json").read_text())
        changed = [weight["name"] for weight in side["weights"] if weight["reason"] == "LoRA"]
        assert len(changed) == 8
        assert not list(tmp_path.glob("*.partial"))

    def test_the_function_does_the_same(self, inside, demo_model, adapter, tmp_path):
        inside("merge", demo_model, adapter, tmp_path / "one" / "m", "--base", "original")
        (tmp_path / "two").mkdir()
        plan = merge_adapter(demo_model, adapter, tmp_path / "two" / "m")
        assert len(plan.changes) == 8
        assert contents(tmp_path / "one" / "m") == contents(tmp_path / "two" / "m")

    def test_any_number_of_files_and_threads(self, inside, demo_model, source, adapter, tmp_path):
        for index, base in enumerate((demo_model, source)):
            options = ("--base", "original", "--threads", index + 1, "--max-shard-size", "1MB")
            assert inside("merge", base, adapter, tmp_path / f"{index}", *map(str, options)).returncode == 0
        one, two = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "1")
        assert all(torch.equal(one[name], two[name]) for name in one)


class TestComparing:
    def test_on_samples(self, inside, demo_model, adapter, tmp_path):
        done = inside("merge", demo_model, adapter, tmp_path / "out", "--format", "int2:g64", *ONCE, "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["base"] == "dequantized"  # nearest to the trained model, which it is but for rounding
        figures = said["comparison"]["figures"]
        assert figures["trained"]["kl"] == 0
        assert 0 < figures["dequantized"]["kl"] < figures["original"]["kl"] / 10
        assert said["comparison"]["tokens"] == 4 * 15

    def test_on_a_text(self, inside, demo_model, adapter, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("Once upon a time there was a little girl. She had a red ball. " * 40)
        done = inside(
            "merge", demo_model, adapter, tmp_path / "out", "--format", "int2:g64", "--text", text, *ONCE
        )
        assert done.returncode == 0, done.stderr
        assert "original: its loss is lower by" in words(
            done.stdout
        )  # int2 harms, and this adapter mends nothing
        assert "text.txt" in done.stdout
        assert "merged into the original weights" in words(done.stdout)
        assert not done.stderr.startswith("assumed")

    def test_what_is_assumed_is_said(self, inside, demo_model, adapter, tmp_path):
        done = inside("merge", demo_model, adapter, tmp_path / "out", *ONCE)
        assert "nf4:g64:dq, the usual way, because nothing says how" in words(done.stderr)

    @pytest.mark.parametrize("kind", ["card", "folder"])
    def test_the_adapter_may_know_how_its_base_was_quantized(
        self, inside, demo_model, adapter, tmp_path, kind
    ):
        if kind == "card":
            (adapter / "README.md").write_text(
                "The following `bitsandbytes` quantization config was used during training:\n"
                "- load_in_4bit: True\n- bnb_4bit_quant_type: fp4\n"
            )
        else:
            inside("quantize", demo_model, tmp_path / "fp4", "--format", "fp4:g64")
            shutil.rmtree(adapter)
            new_adapter(adapter, demo_model, base_model_name_or_path=str(tmp_path / "fp4"))
        done = inside("merge", demo_model, adapter, tmp_path / "out", "--base", "dequantized")
        assert "quantized to fp4:g64 and decoded" in words(done.stdout)
        assert "fp4:g64, as" in words(done.stderr)


class TestDeciding:
    """`decide` on scores that are made up: [divergence, loss, same] of 3 sequences of 2 tokens."""

    def scores(self, *losses: float) -> Tensor:
        loss = torch.tensor(losses, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
        return torch.stack([loss / 10, loss, torch.ones_like(loss)])

    def decide(self, original: Tensor, dequantized: Tensor, text: str | None = "a.txt"):
        trial = Trial(None if text is None else Path(text), None, 3, 0, 8)
        trained = self.scores(1.0, 1.0, 1.0)
        return decide({"trained": trained, "original": original, "dequantized": dequantized}, trial)

    def test_the_lower_loss_wins(self):
        low, high = self.scores(1.0, 2.0, 3.0), self.scores(1.1, 2.2, 3.1)
        assert self.decide(low, high).chosen == "original"
        choice = self.decide(high, low)
        assert choice.chosen == "dequantized"
        assert "loss is lower by 133.33" in choice.why
        assert self.decide(high, low, None).difference == pytest.approx(choice.difference / 10)

    def test_within_error_it_is_the_original(self):
        choice = self.decide(self.scores(1.1, 2.0, 3.1), self.scores(1.0, 2.1, 3.0))
        assert choice.chosen == "original"
        assert "within error" in choice.why

    def test_what_is_not_finite_loses(self):
        fine, broken = self.scores(9.0, 9.0, 9.0), self.scores(1.0, float("nan"), 1.0)
        assert self.decide(broken, fine).chosen == "dequantized"
        assert self.decide(fine, broken).chosen == "original"
        with pytest.raises(ValueError, match="neither"):
            self.decide(broken, broken)


class TestRefusing:
    def test_an_output_that_is_there(self, inside, demo_model, adapter, tmp_path):
        out = tmp_path / "out"
        assert inside("merge", demo_model, adapter, out, "--base", "original").returncode == 0
        assert "--overwrite replaces it" in one_line(inside("merge", demo_model, adapter, out))
        done = inside("merge", demo_model, adapter, out, "--base", "original", "--overwrite")
        assert done.returncode == 0, done.stderr

    def test_an_output_in_a_source(self, inside, source, adapter):
        assert "never written to" in one_line(inside("merge", source, adapter, source / "out"))
        assert "never written to" in one_line(inside("merge", source, adapter, adapter / "out"))
        assert "not what fewbits made" in one_line(inside("merge", source, adapter, source, "--overwrite"))

    def test_merging_twice(self, inside, demo_model, adapter, tmp_path):
        one = tmp_path / "one"
        inside("merge", demo_model, adapter, one, "--base", "original")
        again = one_line(inside("merge", one, adapter, tmp_path / "two", "--again"))
        assert "this very adapter (adapter) already" in again
        other = new_adapter(tmp_path / "other", demo_model, size=0.01)
        assert "--again" in one_line(inside("merge", one, other, tmp_path / "two"))
        done = inside("merge", one, other, tmp_path / "two", "--again", "--base", "original")
        assert done.returncode == 0, done.stderr
        records = json.loads((tmp_path / "two" / "config.json").read_text())["merged_adapters"]
        assert [record["adapter"] for record in records] == ["adapter", "other"]

    def test_merging_twice_is_seen_behind_other_commands(self, inside, demo_model, adapter, tmp_path):
        """The record is a part of the config, which quantizing, loading and saving carry on."""
        inside("merge", demo_model, adapter, tmp_path / "one", "--base", "original")
        inside("quantize", tmp_path / "one", tmp_path / "nf4")
        assert "already" in one_line(inside("merge", tmp_path / "nf4", adapter, tmp_path / "two"))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "saved")
        assert "already" in one_line(inside("merge", tmp_path / "saved", adapter, tmp_path / "two"))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--base", "best"), "neither original nor dequantized"),
            (("--format", "nf4", "--int8"), "exclude each other"),
            (("--quantized", "BASE"), "is not quantized"),
            (("--format", "nf5"), "unknown format"),
            (("--tokens", "9999"), "at most 256 tokens"),
            (("--base", "original", "--format", "nf4"), "leave out --format, --int8"),
            (("--base", "original", "--int8"), "leave out --format, --int8"),
            (("--base", "original", "--samples", "4"), "the only base is the original one"),
            (("--base", "dequantized", "--text", "TEXT"), "the only base is the dequantized one"),
        ],
    )
    def test_options(self, inside, demo_model, adapter, tmp_path, options, said):
        (tmp_path / "text.txt").write_text("A text.")
        there = {"BASE": demo_model, "TEXT": tmp_path / "text.txt"}
        words = [there.get(word, word) for word in options]
        assert said in one_line(inside("merge", demo_model, adapter, tmp_path / "out", *words))
        assert not (tmp_path / "out").exists()

    def test_what_an_interrupted_run_left_before_models_are_compared(
        self, inside, demo_model, adapter, tmp_path, monkeypatch
    ):
        (tmp_path / "out.partial" / ".job").mkdir(parents=True)
        monkeypatch.setattr(sys.modules["fewbits.cli.merge"], "choose", None)  # would fail otherwise
        said = one_line(inside("merge", demo_model, adapter, tmp_path / "out"))
        assert "is what an interrupted run left; --resume goes on with it" in said

    def test_the_original_of_a_quantized_base(self, inside, demo_model, adapter, tmp_path):
        inside("quantize", demo_model, tmp_path / "nf4")
        done = inside("merge", tmp_path / "nf4", adapter, tmp_path / "out", "--base", "original")
        assert "Give the original as BASE" in one_line(done)

    def test_an_adapter_with_nan(self, inside, demo_model, adapter, tmp_path):
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 1] = float("nan")
        save_file(tensors, path)
        said = one_line(inside("merge", demo_model, adapter, tmp_path / "out"))
        assert "1 of 512 values are NaN or infinite" in said

    def test_a_model_without_a_begin_token(self, inside, source, tmp_path):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "bos_token_id": None}))
        whole = tmp_path / "whole"
        whole.mkdir()
        save_file(tensors_of(source), whole / "model.safetensors")
        adapter = new_adapter(tmp_path / "adapter", whole)
        assert "--text FILE" in one_line(inside("merge", source, adapter, tmp_path / "out"))

    def test_too_little_memory_to_compare(self, inside, demo_model, adapter, tmp_path, monkeypatch):
        monkeypatch.setattr("fewbits.cli.merge_choice._BYTES_PER_WEIGHT", 10**12)
        said = one_line(inside("merge", demo_model, adapter, tmp_path / "out"))
        assert "give --base original or --base dequantized" in said

    def test_no_room_on_the_disk(self, inside, demo_model, adapter, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "make room" in one_line(inside("merge", demo_model, adapter, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["locked", "long", "junk", "nul"])
def test_a_foreign_base_that_cannot_be_read_says_nothing(inside, demo_model, tmp_path, monkeypatch, kind):
    """The folder that an adapter's config names may be anything."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{" if kind == "junk" else '{"model_type": "llama"}')
    if kind == "locked":

        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(merge_bases, "read_config", refuse)
    name = {"long": "a" * 5000, "nul": "a\0b"}.get(kind, str(base))
    adapter = new_adapter(tmp_path / "adapter", demo_model, base_model_name_or_path=name)
    done = inside("merge", demo_model, adapter, tmp_path / "out", "--base", "dequantized")
    assert done.returncode == 0, done.stderr
    assert "the usual way, because nothing says how" in words(done.stderr)


def test_no_copy_is_timed(inside, demo_model, adapter, tmp_path, monkeypatch):
    """It would write up to 256 MB that nothing is said of."""
    monkeypatch.setattr("fewbits.cli.running.secrets", None)  # what names the copy
    done = inside("merge", demo_model, adapter, tmp_path / "out", "--base", "original")
    assert done.returncode == 0, done.stderr


def test_an_interrupt_leaves_nothing(inside, demo_model, adapter, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fewbits.integrations.merging.merged", stop)
        done = inside("merge", demo_model, adapter, tmp_path / "out", "--base", "original")
    assert done.returncode == 130
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_run_goes_on(inside, demo_model, adapter, tmp_path, monkeypatch):
    from fewbits.integrations import merging

    options = ("--base", "original", "--max-shard-size", "1MB", "--threads", "1")
    real, calls = merging.merged, 0

    def stop(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "merged", stop)
        done = inside("merge", demo_model, adapter, tmp_path / "out", *options)
    assert done.returncode == 130
    assert "--resume" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "--resume" in one_line(inside("merge", demo_model, adapter, tmp_path / "out", *options))
    assert inside("merge", demo_model, adapter, tmp_path / "out", *options, "--resume").returncode == 0
    assert inside("merge", demo_model, adapter, tmp_path / "whole", *options).returncode == 0
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_the_hash_tells_adapters_apart(demo_model, tmp_path):
    one, two = (new_adapter(tmp_path / f"{size}", demo_model, size=size) for size in (0.1, 0.2))
    assert open_adapter(one).digest != open_adapter(two).digest

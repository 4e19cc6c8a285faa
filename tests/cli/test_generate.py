"""`fewbits generate`, run as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits as library
from fewbits.cli.generate import Sampling, Stream, generate

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes"
PROMPT = "Once upon a time"
Fewbits = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _no_takeover() -> Iterator[None]:
    """Calls of `generate` in this process take the entries of bitsandbytes over."""
    yield
    library.enable()


@pytest.fixture(scope="module")
def greedy(demo_model: Path) -> str:
    """What transformers says the model continues with, 12 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class TestGoodUse:
    def test_only_the_continuation_is_on_stdout(
        self, fewbits: Fewbits, demo_model: Path, greedy: str
    ) -> None:
        done = fewbits("generate", demo_model, PROMPT, "--max-new-tokens", "12", "--threads", "1")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{greedy}\n"
        assert "12 new tokens" in done.stderr
        assert "tokens/s" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_json(self, fewbits: Fewbits, demo_model: Path, greedy: str) -> None:
        done = fewbits("generate", demo_model, PROMPT, "--max-new-tokens", "12", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert report["text"] == greedy
        assert report["new_tokens"] == 12
        assert report["prompt_tokens"] > 2
        assert report["weight_bytes"] == 2 * 3_279_104 + 2 * 4 * 32
        for figure in ("seconds", "tokens_per_second", "load_seconds", "memory_bytes", "prompt_seconds"):
            assert report[figure] > 0

    def test_from_stdin_quantized_and_quiet(self, demo_model: Path) -> None:
        """The fixture gives no stdin, so this one is started here."""
        done = subprocess.run(
            [sys.executable, "-m", "fewbits", "generate", demo_model, "-", "--int8", "-q"],
            input=f"{PROMPT}\n",
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.split()) > 20

    @pytest.mark.slow
    def test_a_quantized_checkpoint(self, fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        made = fewbits("quantize", demo_model, tmp_path / "q", "--format", "nf4:g64:dq", "-q")
        assert made.returncode == 0, made.stderr
        stored = fewbits("generate", tmp_path / "q", PROMPT, "--max-new-tokens", "12", "--json")
        assert stored.returncode == 0, stored.stderr
        fly = fewbits(
            "generate", demo_model, PROMPT, "--max-new-tokens", "12", "--json", "--format", "nf4:g64:dq"
        )
        one, other = json.loads(stored.stdout), json.loads(fly.stdout)
        assert one["text"] == other["text"]
        assert one["weight_bytes"] == other["weight_bytes"] < 2_500_000

    @pytest.mark.slow
    def test_sampling_has_a_seed(self, fewbits: Fewbits, demo_model: Path) -> None:
        arguments = ("generate", demo_model, PROMPT, "--max-new-tokens", "8", "-q", "--temperature", "1.5")
        texts = [fewbits(*arguments, "--seed", seed).stdout for seed in ("1", "1", "2")]
        assert texts[0] == texts[1] != texts[2]

    def test_chat(self, fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        pytest.importorskip("jinja2")
        shutil.copytree(demo_model, tmp_path, dirs_exist_ok=True)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for m in messages %}Once {{ m['content'] }}{% endfor %} there"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        plain = fewbits("generate", demo_model, "Once upon a time there", "--max-new-tokens", "8", "-q")
        chat = fewbits("generate", tmp_path, "upon a time", "--max-new-tokens", "8", "-q", "--chat")
        assert chat.returncode == 0, chat.stderr
        assert chat.stdout == plain.stdout


class TestMistakes:
    @pytest.mark.parametrize(
        ("prompt", "options", "told"),
        [
            ("  ", {}, "the prompt is empty"),
            (PROMPT, {"format": "nf4", "int8": True}, "exclude each other"),
            (PROMPT, {"top_p": 0.5}, "--temperature"),
            (PROMPT, {"chat": True}, "no chat template"),
            (PROMPT * 200, {}, "give a shorter one"),
        ],
    )
    def test_what_makes_no_sense(
        self, demo_model: Path, prompt: str, options: dict[str, Any], told: str
    ) -> None:
        with pytest.raises(ValueError, match=told):
            generate(str(demo_model), prompt, **options)

    @pytest.mark.parametrize(
        ("arguments", "told"), [((), "prompt"), ((PROMPT, "--format", "nf5"), "did you mean 'nf4'")]
    )
    def test_wrong_arguments(
        self, fewbits: Fewbits, demo_model: Path, arguments: tuple[str, ...], told: str
    ) -> None:
        done = fewbits("generate", demo_model, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert told in done.stderr.lower()
        assert "Traceback" not in done.stderr

    def test_no_tokenizer(self, fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(demo_model / name, tmp_path)
        done = fewbits("generate", tmp_path, PROMPT)
        assert (done.returncode, done.stdout) == (2, "")
        assert "tokenizer" in done.stderr
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
            (
                {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
                "no causal language model",
            ),
            ({"num_hidden_layers": 5}, "weights are missing"),
            ({"hidden_size": 128}, "size"),
        ],
    )
    def test_not_the_model_that_it_says(
        self, fewbits: Fewbits, demo_model: Path, tmp_path: Path, changes: dict[str, Any], told: str
    ) -> None:
        shutil.copytree(demo_model, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        done = fewbits("generate", tmp_path, PROMPT)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1

    def test_a_file_cut_off(self, fewbits: Fewbits, demo_model: Path, tmp_path: Path) -> None:
        shutil.copytree(demo_model, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        done = fewbits("generate", tmp_path, PROMPT)
        assert (done.returncode, done.stdout) == (2, "")
        assert "model.safetensors" in done.stderr

    def test_quantizing_twice(self, fewbits: Fewbits) -> None:
        done = fewbits("generate", GOLDEN / "nf4", PROMPT, "--int8")
        assert (done.returncode, done.stdout) == (2, "")
        assert "quantized already; leave --int8 out" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_what_was_written_stays_when_interrupted(demo_model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fewbits",
        "generate",
        str(demo_model),
        PROMPT,
        "--max-new-tokens",
        "250",
    ]
    with subprocess.Popen(
        [*command, "--temperature", "3", "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        first = child.stdout.read(5)
        child.send_signal(signal.SIGINT)
        rest, told = child.stdout.read(), child.stderr.read()
    assert len(first) == 5
    assert rest.endswith("\n")
    if child.returncode != 0:  # 0: it was done before it was interrupted
        assert child.returncode == 130
        assert told == "interrupted\n"


class TestStream:
    def test_words_come_when_they_are_complete(self, demo_model: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
        pieces: list[str] = []
        stream = Stream(tokenizer, pieces.append)
        ids = tokenizer("Once upon a time there was a little girl", add_special_tokens=False).input_ids
        stream.put(torch.tensor([ids[:4]]))
        for token in ids[4:]:
            stream.put(torch.tensor([token]))
        before = "".join(pieces)
        stream.end()
        assert tokenizer.decode(ids[4:]) == stream.text == "".join(pieces)
        assert len(before) < len(stream.text)
        assert len([piece for piece in pieces if piece]) > 2
        assert len(stream.times) == len(ids) - 4
        assert stream.times == sorted(stream.times)


def test_sampling_options() -> None:
    assert Sampling(0, 1, 0).options()["do_sample"] is False
    drawn = Sampling(0.7, 0.9, 3).options()
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"]) == (True, 0.7, 0.9)

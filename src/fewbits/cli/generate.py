"""`fewbits generate`: let a model continue a text, as it comes, and say how fast that was."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import fewbits
from fewbits.checkpoint.folder import Folder, open_folder
from fewbits.cli.common import AsJson, Quiet, find_model, format_bytes, messages, print_json
from fewbits.config import FewbitsConfig
from fewbits.machine import PeakMemory, accelerators

_INT8 = "int8:row@int8:t6"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest."""

    temperature: float
    top_p: float
    seed: int

    def options(self) -> dict[str, Any]:
        """Of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Stream:
    """Takes tokens from transformers' `generate`: hands text to `write` as words are complete, notes times.

    The prompt is passed by. text: all so far; times: when each new token came, seconds.
    """

    tokenizer: Any
    write: Callable[[str], None]
    text: str = ""
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import TextStreamer

        self._words = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._words.on_finalized_text = self._take
        self._started = False

    def put(self, value: Tensor) -> None:
        """The prompt at first, then one new token at a time."""
        if self._started:
            self.times.append(time.perf_counter())
        self._started = True
        self._words.put(value)

    def end(self) -> None:
        """What was held back until its word is complete."""
        self._words.end()

    def _take(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def generate(
    path: Annotated[str, typer.Argument(help="Folder of a causal model, or a model id of the hub.")],
    prompt: Annotated[str, typer.Argument(help='Text to continue; "-" reads it from stdin.')],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total probability.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of drawing tokens.")] = 0,
    format: Annotated[
        str | None, typer.Option(help="Quantize all linear layers while loading, to nf4:g64:dq for instance.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to LLM.int8() while loading.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="as torch chooses")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text. Only the continuation goes to stdout; speed and memory are shown on stderr.

    Takes plain, bitsandbytes and fewbits checkpoints; code that comes with a model is never run. Ctrl-C ends
    it, and what was written stays.

    Example: fewbits generate demo/model "Once upon a time" --int8
    """
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt.strip():
        raise ValueError('the prompt is empty; give a text, or "-" and a text on stdin')
    if top_p < 1 and temperature == 0:
        raise ValueError("--top-p needs tokens to be drawn; give --temperature, 0.7 for instance")
    folder = open_folder(find_model(path))
    config = _quantization(folder, format, int8)
    if threads is not None:
        torch.set_num_threads(threads)
    with _foreign(path):
        tokenizer, ids = _tokens(folder.path, prompt, chat)
    peak = _Peak()
    start = time.perf_counter()
    with _foreign(path):
        model = _load(folder, config)
    load_seconds = time.perf_counter() - start
    stream = Stream(tokenizer, (lambda text: None) if as_json else _echo)
    with _foreign(path), _ends_its_line(stream, as_json):
        length = _length(model, ids, max_new_tokens)
        seconds = _run(model, ids, length, Sampling(temperature, top_p, seed), stream)
    figures = _figures(ids, stream, seconds, load_seconds, peak.nbytes(), model.get_memory_footprint())
    if as_json:
        print_json({"text": stream.text, **figures})
    elif not quiet:
        _note(figures)


def _quantization(folder: Folder, format: str | None, int8: bool) -> FewbitsConfig | None:
    if format is not None and int8:
        raise ValueError("--format and --int8 exclude each other; give one of them")
    spelling = _INT8 if int8 else format
    if spelling is None:
        return None
    config = FewbitsConfig(spelling)
    if folder.quantization is not None:
        raise ValueError(f"{folder.path} is quantized already; leave {'--int8' if int8 else '--format'} out")
    return config


def _tokens(path: Path, prompt: str, chat: bool) -> tuple[Any, Tensor]:
    """(tokenizer, prompt int64 [1, tokens])."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        what = str(error).partition("\n")[0]
        raise ValueError(f"no tokenizer can be loaded here ({what}); add its files") from error
    if not chat:
        return tokenizer, tokenizer(prompt, return_tensors="pt").input_ids
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": prompt}]
    template = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return tokenizer, template["input_ids"]


def _load(folder: Folder, config: FewbitsConfig | None) -> Any:
    """The model, on the accelerator if there is one. ValueError for weights that would be drawn at random."""
    import transformers

    from fewbits.integrations.architecture import clean_config

    settings = clean_config(folder.config)
    model_type, names = settings.pop("model_type", None), settings.get("architectures") or [None]
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    configs = transformers.CONFIG_MAPPING
    if model_type not in configs or configs[model_type] not in known:
        raise ValueError(f"models of type {model_type!r} are no causal language models, which generate takes")
    if names[0] not in (None, known[configs[model_type]].__name__):
        raise ValueError(f"{names[0]} is no causal language model, which generate takes")
    fewbits.enable(takeover=True)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder.path,
        config=configs[model_type].from_dict(settings),
        quantization_config=config,
        device_map="auto" if accelerators() else "cpu",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{len(missing)} weights are missing, such as {missing[0]}; get the model again from its source"
        )
    return model.eval()


def _length(model: Any, ids: Tensor, wanted: int) -> int:
    """How many tokens may follow the prompt."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not longest:
        return wanted
    left = int(longest) - ids.shape[1]
    if left < 1:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, and the model takes {longest}; give a shorter one"
        )
    return min(wanted, left)


def _run(model: Any, ids: Tensor, length: int, sampling: Sampling, stream: Stream) -> tuple[float, float]:
    """(seconds until the first token, seconds of all that follow)."""
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=length,
            streamer=stream,
            **sampling.options(),
        )
    return stream.times[0] - start, stream.times[-1] - stream.times[0]


def _figures(
    ids: Tensor, stream: Stream, seconds: tuple[float, float], load_seconds: float, peak: int, weights: int
) -> dict[str, Any]:
    following = len(stream.times) - 1
    return {
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(stream.times),
        "load_seconds": load_seconds,
        "prompt_seconds": seconds[0],
        "seconds": sum(seconds),
        "tokens_per_second": following / seconds[1] if following and seconds[1] else None,
        "weight_bytes": weights,
        "memory_bytes": peak,
    }


class _Peak:
    """The most memory of this process, or of the accelerator, from now on."""

    def __init__(self) -> None:
        self._place = next(iter(accelerators()), "cpu").partition(":")[0]
        self._resident = PeakMemory()

    def nbytes(self) -> int:
        most = getattr(getattr(torch, self._place), "max_memory_allocated", None)
        return self._resident.bytes_above_start() if most is None else int(most())


# --- output ------------------------------------------------------------------------------------------


def _echo(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _ends_its_line(stream: Stream, as_json: bool) -> Iterator[None]:
    """Whatever happens, what was held back is written, and the line is ended."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            stream.end()
        raise
    finally:
        if not as_json and stream.text:
            _echo("\n")


@contextmanager
def _foreign(path: str) -> Iterator[None]:
    """Name the model in what goes wrong: its files are foreign, and a reader may fail on them in any way."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def _note(figures: dict[str, Any]) -> None:
    rate = figures["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    messages().print(
        f"loaded {format_bytes(figures['weight_bytes'])} of weights in {figures['load_seconds']:.1f} s; "
        f"prompt of {figures['prompt_tokens']} tokens in {figures['prompt_seconds']:.2f} s; "
        f"{figures['new_tokens']} new tokens{speed}; peak memory {format_bytes(figures['memory_bytes'])}",
        style="dim",
        soft_wrap=True,
    )

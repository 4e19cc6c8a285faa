"""One measurement of a whole model in a fresh process: takes a job (JSON) as its argument, prints figures.

Jobs name the work: "transformers" (torch, fewbits, bitsandbytes), "llama_cpp", "write_llama", "write_gguf",
"read", "versions". Nothing of fewbits is imported where another library is measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def module_at(name: str, source: Path) -> Any:
    """A module or package by its file, whatever the path."""
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Not by putting benchmarks/ on the path: transformers would find kernels.py there, and take it for a package.
sys.path.pop(0)
module_at("bench", HERE / "__init__.py")

from bench import model_files  # noqa: E402

PROMPT_TOKENS = 8


def memory_tools() -> Any:
    """fewbits/machine.py by itself, without the package."""
    return module_at("machine", HERE.parent.parent / "src" / "fewbits" / "machine.py")


def transformers(job: dict[str, Any]) -> dict[str, Any]:
    """Load, decode and prefill with a model of transformers."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    prompt = torch.arange(1, PROMPT_TOKENS + 1).unsqueeze(0)
    tiny = load(job, job["warm_up"])
    token_times(tiny, prompt, 2)
    tiny(torch.ones(1, 16, dtype=torch.long), logits_to_keep=1)
    del tiny

    tools = memory_tools()
    peak = tools.PeakMemory()
    start = time.perf_counter()
    model = load(job, job["model"])
    token_times(model, prompt, 1)  # plain weights are only mapped until they are used for the first time
    ready = time.perf_counter()
    figures = {"load_seconds": ready - start, "peak_bytes": peak.bytes_above_start()}
    figures["resident_bytes"] = max(0, tools.resident_bytes() - peak.start)
    if job["tokens"]:
        times = token_times(model, prompt, job["tokens"])
        figures["tokens_per_second"] = (len(times) - 1) / (times[-1] - times[0])
    if job["prefill"]:
        ids = torch.arange(job["prefill"]).remainder(model.config.vocab_size - 1).add(1).unsqueeze(0)
        figures["prefill_seconds"] = best(lambda: model(ids, use_cache=True, logits_to_keep=1))
    figures["parameters"] = model_files.parameters(job["size"])
    return figures


def best(work: Callable[[], object], times: int = 2) -> float:
    """Seconds of the faster of two: the first may prepare what the second finds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def load(job: dict[str, Any], folder: str) -> Any:
    """The model in `folder`, on the CPU, by the library that the job names."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config: Any = None
    if job["library"] == "fewbits":
        import fewbits

        fewbits.enable(takeover=True)
        if "format" in job["settings"]:
            config = fewbits.FewbitsConfig(**job["settings"])
    if job["settings"] and config is None:
        config = BitsAndBytesConfig(**job["settings"])
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype="bfloat16", device_map="cpu"
    ).eval()
    layer = type(model.model.layers[0].mlp.up_proj).__module__
    if not layer.startswith(job["library"]):
        raise RuntimeError(f"{job['library']} was to load {folder}, but its layers are from {layer}")
    return model


def token_times(model: Any, prompt: Any, tokens: int) -> list[float]:
    """Decode greedily exactly that many new tokens; when each was there."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    times: list[float] = []
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        streamer=Clock(),
    )
    return times[1:]  # the first is the prompt


def llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    """The same with llama.cpp, from a GGUF file that is quantized already."""
    warmed = LlamaCpp(job["warm_up"], job["threads"])
    warmed.decode([1] * PROMPT_TOKENS, 2)
    warmed.free()
    tools = memory_tools()
    peak = tools.PeakMemory()
    start = time.perf_counter()
    model = LlamaCpp(job["model"], job["threads"])
    model.decode(list(range(1, PROMPT_TOKENS + 1)), 1)
    ready = time.perf_counter()
    figures = {"load_seconds": ready - start, "peak_bytes": peak.bytes_above_start()}
    figures["resident_bytes"] = max(0, tools.resident_bytes() - peak.start)
    if job["tokens"]:
        times = model.decode(list(range(1, PROMPT_TOKENS + 1)), job["tokens"])
        figures["tokens_per_second"] = (len(times) - 1) / (times[-1] - times[0])
    if job["prefill"]:
        ids = [1 + i % (model.vocabulary - 1) for i in range(job["prefill"])]
        figures["prefill_seconds"] = best(lambda: model.decode(ids, 1))
    figures["parameters"] = model_files.parameters(job["size"])
    return figures


class LlamaCpp:
    """llama.cpp by its C functions: tokens in, greedy tokens out."""

    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, None)
        self.keep = quiet
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 1024, 512, 512
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, prompt: list[int], tokens: int) -> list[float]:
        """From an empty context; when each new token was there."""
        import numpy as np

        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        times, wanted = [], prompt
        for _ in range(tokens):
            given = (api.llama_token * len(wanted))(*wanted)
            if api.llama_decode(self.context, api.llama_batch_get_one(given, len(wanted))):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
            wanted = [int(logits.argmax())]
            times.append(time.perf_counter())
        return times

    def free(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def write_llama(job: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": model_files.write_llama(Path(job["model"]), job["size"])}


def write_gguf(job: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": model_files.write_gguf(Path(job["model"]), job["size"], job["kind"])}


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Plain reading of a model's files."""
    start = time.perf_counter()
    count = model_files.read_plainly(Path(job["model"]))
    return {"bytes": count, "load_seconds": time.perf_counter() - start}


def versions(job: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in job["packages"]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


WORK: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "transformers": transformers,
    "llama_cpp": llama_cpp,
    "write_llama": write_llama,
    "write_gguf": write_gguf,
    "read": read,
    "versions": versions,
}

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    print(json.dumps(WORK[request["work"]](request)), file=answers, flush=True)

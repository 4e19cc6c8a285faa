"""Tiny checkpoints of many architectures, and what tests of loaded models share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import fewbits
from fewbits.nn import QuantModule

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 96

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_MIXTRAL = {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {
    **_DECODER,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "decoder_sparse_step": 1,
}
_LLAMA4 = {
    **_DECODER,
    "head_dim": 16,
    "intermediate_size_mlp": 80,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 64,
}
_GPT_OSS = {**_DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}

# kind → (config class, model class, settings); "auto" classes take it from the checkpoint.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "llama_bias": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_DECODER, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MIXTRAL),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _QWEN_MOE),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_QWEN_MOE, "head_dim": 16}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", _GPT_OSS),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", _LLAMA4),
    "bert": ("BertConfig", "BertModel", _BERT),
    "roberta": ("RobertaConfig", "RobertaModel", {**_BERT, "pad_token_id": 1}),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small take longer to share among threads than to work on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _takeover() -> Iterator[None]:
    """fewbits serves every BitsAndBytesConfig, also beside an installed bitsandbytes."""
    fewbits.enable(takeover=True)
    yield
    fewbits.enable()


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Any]:
    """new_model(kind, **settings): a float32 model whose weights are large enough to matter."""

    def build(kind: str, **settings: Any) -> Any:
        config_class, model_class, defaults = KINDS[kind]
        config = getattr(transformers, config_class)(**{**defaults, **settings})
        torch.manual_seed(7)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    wide = "embed" in name or "wte" in name or "shared" in name
                    parameter.normal_(0, 1.0 if wide else 1.5 * parameter.shape[-1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                else:
                    parameter.uniform_(0.6, 1.4)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def checkpoint(
    new_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """checkpoint(kind, dtype, **settings): the folder of such a model, saved once per session."""
    saved: dict[str, Path] = {}

    def path(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        key = f"{kind}-{dtype}-{sorted(settings.items())}"
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp(kind)
            new_model(kind, **settings).to(dtype).save_pretrained(saved[key])
        return saved[key]

    return path


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """load(path, config, **options): the model of a checkpoint in its own class, ready to infer."""

    def read(path: Path, config: Any = None, **options: Any) -> Any:
        architecture = transformers.AutoConfig.from_pretrained(path).architectures[0]
        if config is not None:
            options["quantization_config"] = config
        return getattr(transformers, architecture).from_pretrained(path, **options).eval()

    return read


@pytest.fixture(scope="session")
def model_of(checkpoint: Callable[..., Path], load: Callable[..., Any]) -> Callable[..., Any]:
    """model_of(scheme, kind, **options): such a model, quantized by a scheme or config while loading."""

    def build(scheme: Any = "nf4:g64:dq", kind: str = "llama", **options: Any) -> Any:
        config = scheme if isinstance(scheme, fewbits.FewbitsConfig) else fewbits.FewbitsConfig(scheme)
        return load(checkpoint(kind), config, **options)

    return build


@pytest.fixture(scope="session")
def run() -> Callable[..., Tensor]:
    """run(model): its logits, or the last hidden states of a bare encoder, on a fixed input."""

    def forward(model: Any, **options: Any) -> Tensor:
        ids = torch.arange(24).reshape(2, 12) * 7 % (VOCABULARY - 2) + 2
        if model.config.is_encoder_decoder:
            options["decoder_input_ids"] = ids[:, :5]
        with torch.no_grad():
            output = model(input_ids=ids, **options)
        result: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return result

    return forward


@pytest.fixture(scope="session")
def quantized() -> Callable[[nn.Module], dict[str, QuantModule]]:
    """quantized(model): its quantized layers by name."""

    def layers(model: nn.Module) -> dict[str, QuantModule]:
        return {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}

    return layers


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, Tensor]]:
    """tensors_of(folder): all tensors in its safetensors files."""

    def read(folder: Path) -> dict[str, Tensor]:
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"no safetensors files in {folder}"
        found: dict[str, Tensor] = {}
        for file in files:
            found |= load_file(file)
        return found

    return read


@pytest.fixture(scope="session")
def same_tensors(tensors_of: Callable[[Path], dict[str, Tensor]]) -> Callable[[Path, Path], None]:
    """same_tensors(one, other): assert that two folders hold the same names, dtypes, shapes and bytes."""

    def compare(one: Path, other: Path) -> None:
        first, second = tensors_of(one), tensors_of(other)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype, name
            assert tensor.shape == second[name].shape, name
            assert as_bytes(tensor) == as_bytes(second[name]), name

    return compare


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """python(script, *arguments): what a fresh interpreter with fewbits on its path prints.

    `packages`: a folder to take all installed packages from, in place of this environment.
    """

    def execute(script: str, *arguments: object, packages: Path | None = None) -> str:
        paths = [str(ROOT / "src"), *filter(None, [str(packages or ""), os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, *(["-S"] if packages else []), "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return execute


@pytest.fixture(scope="session")
def without_bitsandbytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every installed package but bitsandbytes, for an interpreter started with -S."""
    folder = (
        tmp_path_factory.mktemp("packages") / "site-packages"
    )  # by this name dill takes them for installed
    folder.mkdir()
    for place in map(Path, sys.path):
        if place.name in ("site-packages", "dist-packages") and place.is_dir():
            for package in place.iterdir():
                link = folder / package.name
                if not package.name.lower().startswith("bitsandbytes") and not link.exists():
                    link.symlink_to(package)
    return folder

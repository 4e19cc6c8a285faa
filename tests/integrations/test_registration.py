"""How transformers finds fewbits: by import alone, in either order, and only where it is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

import fewbits
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantLinear

THEIRS = {"bitsandbytes_4bit": Bnb4BitHfQuantizer, "bitsandbytes_8bit": Bnb8BitHfQuantizer}

IMPORTS = {
    "fewbits_first": "import fewbits\nimport transformers\n",
    "transformers_first": "import transformers\nimport fewbits\n",
}

# What users have, unchanged; fewbits is one more import.
CODE_BLOCK = """
import importlib.metadata, importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

assert importlib.util.find_spec("bitsandbytes") is None
assert not is_bitsandbytes_available()
assert "bitsandbytes" not in importlib.metadata.packages_distributions()
path, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    path,
    device_map="auto",
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
model.save_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
print(json.dumps({
    "footprint": model.get_memory_footprint(),
    "footprint_again": again.get_memory_footprint(),
    "layer": type(model.model.layers[0].self_attn.q_proj).__module__,
    "config": type(model.config.quantization_config).__module__,
    "same_logits": torch.equal(model(**prompt).logits, again(**prompt).logits),
    "same_tokens": torch.equal(tokens, again.generate(**prompt, max_new_tokens=12, do_sample=False)),
    "text": tokenizer.decode(tokens[0], skip_special_tokens=True),
    "quantized": again.is_quantized,
}))
"""


@pytest.fixture(scope="session")
def full_footprint(demo_model: Path) -> int:
    footprint: int = transformers.AutoModelForCausalLM.from_pretrained(demo_model).get_memory_footprint()
    return footprint


@pytest.mark.parametrize("order", ["fewbits_first", "transformers_first"])
def test_the_code_block_works_without_bitsandbytes(
    order: str,
    python: Callable[..., str],
    without_bitsandbytes: Path,
    demo_model: Path,
    full_footprint: int,
    tmp_path: Path,
) -> None:
    printed = python(IMPORTS[order] + CODE_BLOCK, demo_model, tmp_path, packages=without_bitsandbytes)
    found = json.loads(printed.splitlines()[-1])
    assert found["layer"] == "fewbits.nn"
    assert found["config"] == "transformers.utils.quantization_config"
    assert found["footprint"] == found["footprint_again"] < 0.5 * full_footprint
    assert found["same_logits"]
    assert found["same_tokens"]
    assert found["quantized"]
    assert found["text"].startswith("Once upon a time")
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"


MAPPING = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping
names = ("bitsandbytes_4bit", "bitsandbytes_8bit", "fewbits", "fewbits_bitsandbytes")
print(*(mapping[name].__module__.split(".")[0] for name in names))
print("fewbits.integrations.transformers" in sys.modules)
"""


@pytest.mark.parity
def test_beside_the_real_package_nothing_changes_unasked(python: Callable[..., str]) -> None:
    words = python(IMPORTS["fewbits_first"] + MAPPING).split()
    assert words == ["transformers"] * 2 + ["fewbits"] * 2 + ["True"]


def test_a_request_before_transformers_is_imported_holds(python: Callable[..., str]) -> None:
    script = "import fewbits\nfewbits.enable(False)\nfewbits.enable(True)\n" + MAPPING
    assert python(script).split() == ["fewbits"] * 4 + ["True"]


def test_without_the_package_fewbits_takes_over_unless_told_not_to(
    python: Callable[..., str], without_bitsandbytes: Path
) -> None:
    shows = f"import fewbits\nfewbits.enable(False)\n{MAPPING}\nfewbits.enable()\n{MAPPING}"
    words = python(shows, packages=without_bitsandbytes).split()
    assert words == ["transformers"] * 2 + ["fewbits"] * 2 + ["True"] + ["fewbits"] * 4 + ["True"]


@pytest.mark.parity
def test_enable_switches_back_and_forth() -> None:
    for takeover, ours in ((True, True), (False, False), (True, True), (None, False)):
        fewbits.enable(takeover)
        for method, original in THEIRS.items():
            assert auto.AUTO_QUANTIZER_MAPPING[method] is (FewbitsQuantizer if ours else original)
        for method in ("fewbits", "fewbits_bitsandbytes"):
            assert auto.AUTO_QUANTIZER_MAPPING[method] is FewbitsQuantizer


def test_other_methods_are_left_alone() -> None:
    owned = {name for name, quantizer in auto.AUTO_QUANTIZER_MAPPING.items() if quantizer is FewbitsQuantizer}
    assert owned == {"fewbits", "fewbits_bitsandbytes", *THEIRS}
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] is transformers.BitsAndBytesConfig
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["fewbits"] is fewbits.FewbitsConfig


@pytest.mark.parametrize("config", [fewbits.BitsAndBytesConfig(load_in_4bit=True), fewbits.FewbitsConfig()])
def test_own_configs_need_no_takeover(
    config: Any, checkpoint: Callable[..., Path], load: Callable[..., Any]
) -> None:
    fewbits.enable(takeover=False)
    model = load(checkpoint("llama"), config)
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantLinear)


def test_enable_leaves_loaded_models_as_they_are(
    checkpoint: Callable[..., Path], load: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    model = load(checkpoint("llama"), transformers.BitsAndBytesConfig(load_in_4bit=True))
    before = run(model)
    fewbits.enable(takeover=False)
    assert run(model).equal(before)
    model.save_pretrained(tmp_path)
    fewbits.enable(takeover=True)
    assert run(load(tmp_path)).equal(before)

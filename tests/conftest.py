"""Fixtures and the quiet, offline, reproducible environment that every test runs in."""

import os

# Read at import time by torch, tokenizers and huggingface_hub, so they come before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if UNDER_XDIST:
    os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SHARED_MODELS = REPO.parent / "shared" / "models"

if UNDER_XDIST:
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("parity") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes to compare with: pip install 'fewbits[parity]'")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small Llama that comes with the repository."""
    return REPO / "demo" / "model"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """A folder of further small models, beside the checkout where there is one."""
    if not SHARED_MODELS.is_dir():
        pytest.skip("no folder ../shared/models beside this checkout")
    return SHARED_MODELS

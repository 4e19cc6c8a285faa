"""What `fewbits plan` estimates, against the memory of processes that do it: within BOUND."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from fewbits.cli.plan_methods import EMBEDDING_FORMAT, Case, Row, Source

ROOT = Path(__file__).resolve().parents[2]
BOUND = 0.15  # as `fewbits plan` says
HEAP = 0.6  # with glibc's heap as it comes, at most this much more than estimated

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs /proc/<pid>/status to see anonymous memory"
)

# Does all of it with a tiny model first, so that libraries do not count.
WORKER = """
import json, sys, torch, fewbits
from transformers import AutoModelForCausalLM
tiny, large, format, modules, batch, tokens, rank = json.loads(sys.argv[1])
options = {"quantization_config": fewbits.FewbitsConfig(format, modules)} if format else {}

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, **options)

def generate(model, tokens):
    ids = torch.zeros(batch, tokens - 4, dtype=torch.long)
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)

def train(model, tokens):
    from peft import LoraConfig, get_peft_model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    for _ in range(2):
        mask = torch.ones_like(ids)
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

run = train if rank else generate
run(load(tiny), 8)
for step in (lambda: load(large), lambda: run(model, tokens)):
    print("ready", flush=True)
    sys.stdin.readline()
    model = step() or globals().get("model")
    print(model.get_memory_footprint(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="session")
def llama_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """llama_of(width, layers, vocabulary): the folder of a random Llama in bfloat16, made once."""
    made: dict[tuple[int, int, int], Path] = {}

    def build(width: int, layers: int, vocabulary: int) -> Path:
        key = (width, layers, vocabulary)
        if key not in made:
            config = transformers.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=11 * width // 4,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                num_key_value_heads=width // 128,
                tie_word_embeddings=False,
            )
            torch.manual_seed(0)
            made[key] = tmp_path_factory.mktemp("llama")
            transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made[key])
        return made[key]

    return build


@pytest.fixture(scope="session")
def measured(llama_of: Callable[..., Path]) -> Callable[..., tuple[int, int, int]]:
    """measured(folder, row, case, **environment): (peak while loading, while running, weights) in bytes.

    Weights that are read as they are stay mapped from their file, and are added. By default, glibc is told to
    give freed blocks back at once, so that memory is what is in use.
    """

    def measure(folder: Path, row: Row, case: Case, **environment: str) -> tuple[int, int, int]:
        modules = dict.fromkeys(row.embeddings, EMBEDDING_FORMAT)
        job: list[object] = [str(llama_of(128, 2, 512)), str(folder), row.method.format, modules]
        child = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                WORKER,
                json.dumps([*job, case.batch, case.context, case.rank]),
            ],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "262144",
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with child:
            starts, peaks, weights = [], [], 0
            for _ in range(2):
                assert answer(child) == "ready"
                starts.append(anonymous_bytes(child.pid))
                tell(child)
                peaks.append(max(sampled_until_output(child)) - starts[0])
                weights = int(answer(child))
                tell(child)
        mapped = sum(entry.nbytes for entry in row.kept)
        return peaks[0] + mapped, peaks[1] + mapped, weights

    return measure


def answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def sampled_until_output(child: subprocess.Popen[str]) -> Iterator[int]:
    yield anonymous_bytes(child.pid)
    while not select.select([child.stdout], [], [], 0.0005)[0]:
        yield anonymous_bytes(child.pid)


def row_of(folder: Path, key: str, case: Case) -> Row:
    return next(row for row in Source(folder).rows(case) if row.method.key == key)


def check(row: Row, measure: Callable[[], tuple[int, int, int]], *, weights: bool = True) -> None:
    """Within BOUND. Peaks are sampled and a busy machine may miss one: the highest of three tries counts."""
    one, loading, running = row.estimate, 0, 0
    for _ in range(3):
        tried = measure()
        loading, running = max(loading, tried[0]), max(running, tried[1])
        if one.loading <= loading * (1 + BOUND) and (one.running or 0) <= running * (1 + BOUND):
            break
    shown = f"loading {loading:,} for {one.loading:,}; running {running:,} for {one.running:,}"
    assert not weights or tried[2] == one.weights
    assert one.loading == pytest.approx(loading, rel=BOUND), shown
    assert one.running == pytest.approx(running, rel=BOUND), shown


METHODS = ("stored", "int8", "nf4", "nf4-dq", "nf4-dq-embeddings", "int3-embeddings")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "batch", "context"),
    [*((key, 1, 512) for key in METHODS), ("int8", 1, 4096), ("nf4-dq", 4, 1024)],
)
def test_generating(
    key: str,
    batch: int,
    context: int,
    llama_of: Callable[..., Path],
    measured: Callable[..., tuple[int, int, int]],
) -> None:
    folder, case = llama_of(1024, 10, 8192), Case(context, batch, None)
    row = row_of(folder, key, case)
    check(row, lambda: measured(folder, row, case))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "batch", "context"), [("stored", 1, 512), ("int8", 1, 512), ("nf4-dq", 2, 1024)]
)
def test_training(
    key: str,
    batch: int,
    context: int,
    llama_of: Callable[..., Path],
    measured: Callable[..., tuple[int, int, int]],
) -> None:
    pytest.importorskip("peft")
    folder, case = llama_of(1024, 10, 8192), Case(context, batch, 16)
    row = row_of(folder, key, case)
    check(row, lambda: measured(folder, row, case), weights=False)


@pytest.mark.slow
def test_the_heap_as_it_comes(
    llama_of: Callable[..., Path], measured: Callable[..., tuple[int, int, int]]
) -> None:
    folder, case = llama_of(1024, 10, 8192), Case(4096, 1, None)
    row = row_of(folder, "nf4-dq", case)
    _, running, _ = measured(folder, row, case, MALLOC_MMAP_THRESHOLD_="33554432")
    assert row.estimate.running is not None
    assert (1 - BOUND) * row.estimate.running < running < (1 + HEAP) * row.estimate.running

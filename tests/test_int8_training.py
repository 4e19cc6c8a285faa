"""Training through LLM.int8(): frozen arithmetic, true gradients, and codes that are never stale."""

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fewbits import BitsAndBytesConfig, ops, quantize_model
from fewbits.format import Scheme
from fewbits.int8_training import TrainableInt8Linear, freeze
from fewbits.nn import QuantLinear
from fewbits.report import report

SOURCE = Path(__file__).resolve().parents[1] / "src"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEADS = [(), (1,), (7,), (2, 3), (2, 1, 3), (0,)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_threshold = pytest.mark.parametrize("activation", ["int8:t6", "int8"])


def trainable(
    columns: int = 65,
    rows: int = 11,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    activation: str = "int8:t6",
) -> TrainableInt8Linear:
    source = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    return TrainableInt8Linear.of(source, Scheme.parse(f"int8:row@{activation}"))


def with_outliers(*lead: int, columns: int = 65, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*lead, columns).to(dtype)
    x[..., 3] *= 20
    return x


def expected(layer: TrainableInt8Linear, x: torch.Tensor) -> torch.Tensor:
    """LLM.int8() with the codes that the weight has now."""
    activation = str(layer.scheme.activation)
    with torch.no_grad():
        return ops.linear(x, ops.quantize(layer.matrix(), "int8:row"), layer.bias, activation=activation)


# --- forward ----------------------------------------------------------------------------------------


@every_dtype
@every_threshold
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_forward_is_that_of_the_frozen_layer_in_training_and_in_evaluation(lead, activation, dtype):
    layer = trainable(dtype=dtype, activation=activation)
    x = with_outliers(*lead, dtype=dtype)
    wanted = expected(layer, x)
    assert wanted.shape == (*lead, 11)
    assert torch.equal(layer.train()(x), wanted)
    assert torch.equal(layer(x.clone().requires_grad_()), wanted)
    assert torch.equal(layer.eval()(x), wanted)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer.train()(x), wanted)
    assert torch.equal(layer.frozen()(x), wanted)


def test_the_threshold_is_used_in_training():
    x = with_outliers(5).requires_grad_()
    layer, without = trainable(), trainable(activation="int8")
    without.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), without(x))


@every_threshold
def test_under_autocast_it_computes_and_returns_that_dtype_like_any_linear_layer(activation):
    layer, x = trainable(activation=activation), with_outliers(4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), y)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected(layer, x.detach().bfloat16()))
    y.float().sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (torch.float32,) * 3


# --- gradients --------------------------------------------------------------------------------------


@every_dtype
@every_threshold
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_gradients_are_those_of_the_formulas(lead, activation, dtype):
    """grad_x = grad · ŵ with the decoded codes ŵ, grad_weight = gradᵀ · x, grad_bias = Σ grad."""
    layer = trainable(dtype=dtype, activation=activation)
    x = with_outliers(*lead, dtype=dtype).requires_grad_()
    grad = torch.randn(*lead, 11).to(dtype)
    layer(x).backward(grad)
    decoded = ops.quantize(layer.weight, "int8:row").dequantize(torch.float32).double()
    rows, inputs = grad.double().reshape(-1, 11), x.detach().double().reshape(-1, 65)
    eps = torch.finfo(dtype).eps
    pairs = [
        (x.grad.reshape(-1, 65), rows @ decoded, rows.abs() @ decoded.abs()),
        (layer.weight.grad, rows.T @ inputs, rows.abs().T @ inputs.abs()),
        (layer.bias.grad, rows.sum(0), rows.abs().sum(0)),
    ]
    for mine, truth, size in pairs:
        assert mine.dtype == dtype
        # The result is rounded, and so may be the decoded weight, or a sum on its way.
        assert ((mine.double() - truth).abs() <= eps * truth.abs() + 2 * eps * size).all()


@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias",), ("x", "weight")], ids=str)
def test_only_the_gradients_asked_for_are_computed_and_only_what_they_need_is_kept(needs):
    layer, x = trainable(), torch.randn(7, 65)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needs)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        layer(x).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(needs)
    partner = {"x": layer.weight, "weight": x}
    assert {one.data_ptr() for one in kept} == {partner[n].data_ptr() for n in needs if n in partner}


def test_the_gradient_survives_offloading_and_checkpointing():
    layer, x = trainable(), with_outliers(7).requires_grad_()
    layer(x).square().sum().backward()
    wanted = [x.grad.clone(), layer.weight.grad.clone()]
    contexts = {
        "offloaded": (torch.autograd.graph.save_on_cpu(), layer),
        "copied": (torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone), layer),
        "recomputed": (torch.enable_grad(), lambda x: checkpoint(layer, x, use_reentrant=False)),
        "reentrant": (torch.enable_grad(), lambda x: checkpoint(layer, x, use_reentrant=True)),
    }
    for name, (context, run) in contexts.items():
        x.grad = layer.weight.grad = None
        with context:
            run(x).square().sum().backward()
        assert torch.equal(x.grad, wanted[0]), name
        assert torch.equal(layer.weight.grad, wanted[1]), name


@pytest.mark.filterwarnings("error")
def test_gradients_of_gradients_take_rounding_for_the_identity_as_well():
    """Of L = Σy³ and S = Σ u·∂L/∂x, with ŵ the decoded codes: ∂L/∂x = 3y²·ŵ."""
    layer, x, u = trainable(), with_outliers(2, 3).requires_grad_(), torch.randn(2, 3, 65)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    of_x, of_weight = torch.autograd.grad((grad * u).sum(), (x, layer.weight))
    decoded = ops.quantize(layer.weight, "int8:row").dequantize(torch.float64)
    y, u, x = (one.detach().double().reshape(6, -1) for one in (y, u, x))
    of_y = u @ decoded.T * 6 * y
    torch.testing.assert_close(of_x.double().reshape(6, 65), of_y @ decoded, rtol=1e-4, atol=1e-3)
    truth = (3 * y.square()).T @ u + of_y.T @ x
    torch.testing.assert_close(of_weight.double(), truth, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_whole_it_gives_the_eager_result_and_follows_the_weight(autocast):
    torch._dynamo.reset()
    layer = trainable()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = with_outliers(rows)
        for module, run in ((layer, compiled), (twin, twin)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                run(x).float().square().sum().backward()
            torch.optim.SGD(module.parameters(), lr=1e-3).step()
        assert torch.equal(layer.weight, twin.weight)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(compiled(x), twin(x))


# --- codes follow the weight ------------------------------------------------------------------------


def step(layer: TrainableInt8Linear) -> None:
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.AdamW([layer.weight], lr=0.1).step()


def fused_step(layer: TrainableInt8Linear) -> None:
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.AdamW([layer.weight], lr=0.1, fused=True).step()


def replace_weight(layer: TrainableInt8Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def replace_weight_behind_its_back(layer: TrainableInt8Linear) -> None:
    layer._parameters["weight"] = nn.Parameter(torch.randn_like(layer.weight))


def replace_twice_at_one_address(layer: TrainableInt8Linear) -> None:
    values = layer.weight.detach().clone()
    for _ in range(2):
        values = -values * 1.7
        layer._parameters["weight"] = nn.Parameter(values)


CHANGES: dict[str, Callable[[TrainableInt8Linear], object]] = {
    "an optimizer step": step,
    "a fused optimizer step": fused_step,
    "copy_": lambda layer: layer.weight.detach().copy_(torch.randn(11, 65)),
    "one element": lambda layer: layer.weight.detach()[3, 5].fill_(9.0),
    "load_state_dict": lambda layer: layer.load_state_dict(trainable().state_dict()),
    "load_state_dict(assign=True)": lambda layer: layer.load_state_dict(
        trainable().state_dict(), assign=True
    ),
    "to(bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "half and back": lambda layer: layer.half().float(),
    "weight.data =": lambda layer: setattr(layer.weight, "data", torch.randn(11, 65)),
    "another weight": replace_weight,
    "another weight, put in by a loader": replace_weight_behind_its_back,
    "a weight where the last one was": replace_twice_at_one_address,
    "weight.data.mul_()": lambda layer: layer.weight.data.mul_(-3.0),
    "merging an adapter": lambda layer: setattr(layer.weight, "data", layer.weight.data.add_(1.0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_codes_follow_the_weight_whatever_changes_it(change, training):
    layer, x = trainable().train(training), with_outliers(3)
    with torch.no_grad():
        before = layer(x)
    for _ in range(3):
        change(layer)
        x = x.to(layer.weight.dtype)
        with torch.no_grad():
            assert torch.equal(layer(x), expected(layer, x))
        assert torch.equal(layer(x.clone().requires_grad_()), expected(layer, x))
    assert not torch.equal(before, layer(x).to(before.dtype))


@pytest.mark.parametrize("training", [False, True])
def test_a_write_that_torch_does_not_count_is_seen(training):
    layer, x = trainable().train(training), with_outliers(3)
    for _ in range(3):
        layer.weight.data.numpy()[:] *= -2  # as a kernel of an optimizer does
        with torch.no_grad():
            assert torch.equal(layer(x), expected(layer, x))
        layer(x).sum().backward()
        assert torch.equal(layer(x), expected(layer, x))


def test_in_inference_mode_where_torch_counts_no_writes_codes_follow_too():
    with torch.inference_mode():
        layer, x = trainable().eval(), with_outliers(3)
        for _ in range(2):
            layer.weight.mul_(-2)
            assert torch.equal(layer(x), expected(layer, x))


def test_functional_calls_use_the_weight_that_they_are_given():
    layer, x = trainable().eval(), with_outliers(3)
    with torch.no_grad():
        before = layer(x)
        other = {"weight": layer.weight * -2, "bias": layer.bias}
        moved = torch.func.functional_call(layer, other, (x,))
        assert not torch.equal(moved, before)
        assert torch.equal(layer(x), before)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _through_file(layer),
}


def _through_file(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(copied):
    layer, x = trainable().eval(), with_outliers(3)
    with torch.no_grad():
        y = layer(x)
        twin = copied(layer)
        assert torch.equal(twin(x), y)
        twin.weight.mul_(-2)
        assert not torch.equal(twin(x), y)
        assert torch.equal(layer(x), y)


# Two processes, each with half of every weight; the codes come from the gathered weight.
SHARDED = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from fewbits.format import Scheme
from fewbits.int8_training import TrainableInt8Linear
rank, port = map(int, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
def network():
    layers = [TrainableInt8Linear.of(nn.Linear(65, 65), Scheme.parse("int8:row@int8:t6")) for _ in range(2)]
    return nn.Sequential(*layers)
whole, sharded = network(), network()
sharded.load_state_dict(whole.state_dict())
for layer in sharded:
    fully_shard(layer)
fully_shard(sharded)
x = torch.randn(4, 65) * 3
optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (whole, sharded)]
for _ in range(3):
    for model, optimizer in zip((whole, sharded), optimizers):
        model.eval()
        with torch.no_grad():
            model(x), model(x)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(sharded(x), whole(x)), (sharded(x) - whole(x)).abs().max()
        for one in (*whole.parameters(), *sharded.parameters()):  # no product with a gradient between
            getattr(one, "to_local", lambda one=one: one)().mul_(-1.5)
        assert torch.equal(sharded(x), whole(x)), "the codes are not those of the weight"
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_sharded_weight_gives_the_same_training():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), str(port)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


# --- in models --------------------------------------------------------------------------------------

CONFIG = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(65, 96, dtype=dtype), nn.GELU(), nn.Linear(96, 11, bias=False, dtype=dtype)
    )


@every_dtype
def test_quantize_model_keeps_the_weights_themselves_and_reports_how_they_multiply(dtype):
    model = network(dtype)
    before = list(model.parameters())
    shown = quantize_model(model, CONFIG)
    assert type(model[0]) is type(model[2]) is TrainableInt8Linear
    assert [id(one) for one in model.parameters()] == [id(one) for one in before]
    assert all(one.requires_grad for one in model.parameters())
    name = str(dtype).removeprefix("torch.")
    assert [entry.stored for entry in shown.quantized] == [f"{name}, multiplied as int8:row@int8:t6"] * 2
    assert [entry.name for entry in shown.kept] == ["0.bias"]
    assert [entry.nbytes for entry in shown.quantized] == [96 * 65 * dtype.itemsize, 11 * 96 * dtype.itemsize]


@every_dtype
def test_freezing_gives_the_layers_that_quantizing_the_trained_weights_gives(dtype):
    model = network(dtype)
    quantize_model(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 65).to(dtype)).float().square().sum().backward()
    optimizer.step()
    plain = network(dtype)
    plain.load_state_dict(model.state_dict())
    quantize_model(plain, BitsAndBytesConfig(load_in_8bit=True))
    x = with_outliers(4, dtype=dtype)
    y = model(x)
    freeze(model)
    assert type(model[0]) is QuantLinear
    assert torch.equal(model(x), y)
    mine, wanted = model.state_dict(), plain.state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in mine)
    assert [entry.stored for entry in report(model).quantized] == ["int8:row@int8:t6"] * 2


def test_a_conv1d_keeps_its_orientation_and_freezes_like_one():
    model, plain = nn.Sequential(Conv1D(11, 65)), nn.Sequential(Conv1D(11, 65))
    plain.load_state_dict(model.state_dict())
    quantize_model(model, CONFIG)
    quantize_model(plain, BitsAndBytesConfig(load_in_8bit=True))
    x = with_outliers(2, 3).requires_grad_()
    y = model(x)
    assert model[0].weight.shape == (65, 11)
    assert torch.equal(y, plain(x))
    y.sum().backward()
    torch.testing.assert_close(model[0].weight.grad, x.detach().sum((0, 1))[:, None].expand(65, 11))
    again = model[0].plain()
    assert type(again) is Conv1D
    assert again.weight is model[0].weight
    freeze(model)
    assert torch.equal(model[0].weight, plain[0].weight)


def test_a_weight_that_turned_nan_is_named():
    model = network()
    quantize_model(model, CONFIG)
    with torch.no_grad():
        model[2].weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="the weight of a layer in training holds NaN"):
        model(torch.randn(2, 65))
    with pytest.raises(ValueError, match=r"cannot freeze 2: .*NaN"):
        freeze(model)


def test_only_llm_int8_trains_weights():
    for spelling in ("nf4:g64", "int8:row", "int8:g32@int8", "int4:g32@int8:g32"):
        with pytest.raises(ValueError, match=r"only LLM.int8\(\) trains|cannot be multiplied"):
            TrainableInt8Linear(64, 8, True, Scheme.parse(spelling))


def test_the_meta_device_gives_shapes_and_nothing_else():
    with torch.device("meta"):
        model = network()
    quantize_model(model, CONFIG)
    assert model(torch.randn(3, 65, device="meta")).shape == (3, 11)
    assert model.eval()(torch.randn(3, 65, device="meta")).shape == (3, 11)
    freeze(model)
    assert model[0].weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_training_falls_as_that_of_plain_weights_does(dtype):
    """A classifier of noisy clusters: same seed, same batches, the losses stay together."""
    centres = torch.randn(11, 65)
    losses = {}
    for kind in ("plain", "int8"):
        torch.manual_seed(1)
        model = network(dtype)
        if kind == "int8":
            quantize_model(model, CONFIG)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[kind] = []
        for _ in range(40):
            target = torch.randint(11, (32,))
            x = (centres[target] + torch.randn(32, 65)).to(dtype)
            loss = nn.functional.cross_entropy(model(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
    assert losses["int8"][-1] < 0.1 * losses["int8"][0]
    assert losses["int8"] != losses["plain"]
    gaps = [abs(one - other) for one, other in zip(losses["int8"], losses["plain"], strict=True)]
    assert max(gaps) < 0.02 * losses["plain"][0], max(gaps)

"""A model's folder: found as transformers finds it, and nothing outside it is read."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fewbits.checkpoint.folder import Folder, check_values, open_folder, some
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save(path: Path, **tensors: torch.Tensor) -> None:
    safetensors.torch.save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "limits": [0.0, Infinity]}')
    save(folder / "model.safetensors", a=torch.arange(6.0).view(2, 3), b=torch.ones(4, dtype=torch.bfloat16))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    save(folder / SHARDS[0], a_weight=torch.ones(2, 3))
    save(folder / SHARDS[1], b_weight=torch.zeros(5), c_weight=torch.zeros(0))
    write_index(folder, {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "c.weight": SHARDS[1]})
    return folder


class TestGoodFolders:
    def test_single(self, single: Path) -> None:
        folder = open_folder(single)
        assert folder.config["model_type"] == "llama"
        assert folder.quantization is None
        assert dict(folder.files) == {"a": "model.safetensors", "b": "model.safetensors"}
        assert folder.info("a").shape == (2, 3)
        assert folder.nbytes == 24 + 8
        assert torch.equal(folder.read("a"), torch.arange(6.0).view(2, 3))
        assert folder.read("b").dtype == torch.bfloat16

    def test_sharded(self, sharded: Path) -> None:
        folder = open_folder(sharded)
        assert tuple(folder.headers) == SHARDS
        assert folder.files == {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "c.weight": SHARDS[1]}
        assert folder.quantization == {"quant_method": "gptq"}
        assert torch.equal(folder.read("b.weight"), torch.zeros(5))

    def test_a_single_file_goes_before_an_index(self, sharded: Path) -> None:
        """As transformers chooses; the shards are then not looked at."""
        save(sharded / "model.safetensors", x=torch.ones(1))
        (sharded / SHARDS[0]).write_bytes(b"damaged")
        assert set(open_folder(sharded).files) == {"x"}

    def test_files_that_no_index_names_are_left_alone(self, sharded: Path) -> None:
        (sharded / "consolidated.safetensors").write_bytes(b"anything")
        (sharded / "pytorch_model.bin").write_bytes(b"anything")
        assert len(open_folder(sharded).files) == 3

    def test_the_demo_model(self, demo_model: Path) -> None:
        folder = open_folder(demo_model)
        assert folder.nbytes == 6_558_208
        read = safetensors.torch.load_file(demo_model / "model.safetensors")
        assert set(read) == set(folder.files)
        assert all(torch.equal(folder.read(name), tensor) for name, tensor in read.items())

    def test_threads_read_at_once(self, tmp_path: Path) -> None:
        tensors = {f"t{number}": torch.full((1000 + number,), float(number)) for number in range(40)}
        (tmp_path / "config.json").write_text("{}")
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        folder = open_folder(tmp_path)
        with ThreadPoolExecutor(8) as pool:
            read = dict(zip(tensors, pool.map(folder.read, tensors), strict=True))
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())

    def test_a_file_that_changed_is_not_read(self, single: Path) -> None:
        folder = open_folder(single)
        os.truncate(single / "model.safetensors", folder.headers["model.safetensors"].size - 1)
        with pytest.raises(CheckpointError, match=r"model.safetensors changed while it was in use"):
            folder.read("a")
        with pytest.raises(CheckpointError, match=r"model.safetensors changed while it was in use"):
            check_values(folder, ["a"], lambda _: None)


def replace_config(text: str | bytes) -> Callable[[Path], object]:
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / "config.json").write_bytes(content)


def replace_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def point_to(name: str) -> Callable[[Path], object]:
    return lambda folder: write_index(folder, {"a.weight": name})


OUTSIDE = "only .safetensors files of the folder itself are read"
NO_MAP = "weight_map does not map tensors to file names"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config.json; name the folder"),
    "config of garbage": (replace_config(b"\xff\xfe"), r"config.json is not UTF-8 text \(invalid start"),
    "config no object": (replace_config("[]"), r"config.json is no JSON object"),
    "config deeply nested": (replace_config('{"a":' + "[" * 10**5), r"config.json cannot be read as JSON"),
    "config with names twice": (replace_config('{"a": 1, "a": 2}'), r"the name a stands twice"),
    "config over the cap": (replace_config(" " * 10_000_001), r"10000001 bytes, over the limit of 10000000"),
    "quantization no object": (
        replace_config('{"quantization_config": 4}'),
        r"quantization_config is no JSON",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), r"has no model.safetensors; .*rename it, or add"),
    "index of garbage": (replace_index("{"), rf"{INDEX} cannot be read as JSON"),
    "index without map": (replace_index("{}"), NO_MAP),
    "index with a list": (replace_index('{"weight_map": []}'), NO_MAP),
    "index of nothing": (replace_index('{"weight_map": {}}'), NO_MAP),
    "index of numbers": (replace_index('{"weight_map": {"a": 1}}'), NO_MAP),
    "index with names twice": (replace_index('{"weight_map": {"a": "b", "a": "b"}}'), r"the name a stands"),
    "shard absolute": (point_to("/etc/a.safetensors"), OUTSIDE),
    "shard in a parent": (point_to("../a.safetensors"), OUTSIDE),
    "shard in a subfolder": (point_to("sub/a.safetensors"), OUTSIDE),
    "shard behind a backslash": (point_to("..\\a.safetensors"), OUTSIDE),
    "shard of a drive": (point_to("C:a.safetensors"), OUTSIDE),
    "shard of another kind": (point_to("pytorch_model.bin"), OUTSIDE),
    "shard with a zero byte": (point_to("a\0.safetensors"), OUTSIDE),
    "shard without a name": (point_to(""), OUTSIDE),
    "shard of half a character": (point_to("\ud800.safetensors"), OUTSIDE),
    "shard missing": (
        lambda folder: (folder / SHARDS[1]).unlink(),
        rf"1 of 2 weight files are missing: {SHARDS[1]}; get them",
    ),
    "shard a folder": (
        lambda folder: ((folder / SHARDS[1]).unlink(), (folder / SHARDS[1]).mkdir()),
        rf"{SHARDS[1]} is not a regular file",
    ),
    "shard damaged": (
        lambda folder: (folder / SHARDS[1]).write_bytes(b"\x99" * 30),
        rf"{SHARDS[1]}: a header of \d+ bytes is over the limit",
    ),
    "tensor not in its shard": (
        lambda folder: write_index(
            folder, {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1]}
        ),
        rf"{SHARDS[0]} lacks tensor b.weight, which {INDEX} puts there",
    ),
    "tensor that no index names": (
        lambda folder: write_index(folder, {"a.weight": SHARDS[0], "c.weight": SHARDS[1]}),
        rf"{SHARDS[1]}, tensor b.weight: {INDEX} does not name it",
    ),
    "tensor in two shards": (
        lambda folder: save(folder / SHARDS[0], a_weight=torch.ones(1), b_weight=torch.ones(5)),
        rf"tensor b.weight is in {SHARDS[0]} and again in {SHARDS[1]}",
    ),
    "several problems": (
        lambda folder: write_index(folder, {"a.weight": SHARDS[0], "x": SHARDS[1], "y": SHARDS[1]}),
        r"lacks tensor x, .* \(and 3 more such problems\)",
    ),
}


class TestHostileFolders:
    @pytest.mark.parametrize("case", HOSTILE)
    def test_refused(self, sharded: Path, case: str) -> None:
        change, message = HOSTILE[case]
        change(sharded)
        with pytest.raises(CheckpointError, match=message):
            open_folder(sharded)

    def test_no_folder(self, single: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; name the folder"):
            open_folder(single / "nowhere")
        with pytest.raises(NotADirectoryError, match=r"config.json is a file; name the folder"):
            open_folder(single / "config.json")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
    def test_only_pickles(self, single: Path, name: str) -> None:
        (single / "model.safetensors").rename(single / name)
        with pytest.raises(CheckpointError, match=rf"only pickle weights \({name}\).* save_pretrained it"):
            open_folder(single)

    def test_no_weights(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"has no weights: neither model.safetensors nor"):
            open_folder(single)

    def test_many_missing_shards(self, sharded: Path) -> None:
        write_index(sharded, {f"t{number}": f"m{number:02}.safetensors" for number in range(20)})
        with pytest.raises(CheckpointError, match=r"20 of 20 .*: m00.safetensors, .* and 15 more;"):
            open_folder(sharded)

    @pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[0]])
    def test_a_pipe_is_not_waited_for(self, sharded: Path, name: str) -> None:
        (sharded / name).unlink()
        os.mkfifo(sharded / name)
        errors: list[Exception] = []
        thread = threading.Thread(target=_collect, args=(sharded, errors), daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert isinstance(errors[0], CheckpointError)
        assert f"{name} is not a regular file" in str(errors[0])

    def test_a_device_is_not_opened(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        (single / "model.safetensors").symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match=r"model.safetensors is a link out of its folder"):
            open_folder(single)

    def test_some(self) -> None:
        assert some(["a", "b\n"]) == r"a, 'b\n'"
        assert some("abcdefg", 3) == "a, b, c and 4 more"


def _collect(path: Path, errors: list[Exception]) -> None:
    try:
        open_folder(path)
    except Exception as error:
        errors.append(error)


class TestLinks:
    def test_the_folder_itself_may_be_a_link(self, single: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(single)
        assert open_folder(tmp_path / "link").nbytes == 32

    def test_within_the_folder(self, single: Path) -> None:
        (single / "model.safetensors").rename(single / "w.safetensors")
        (single / "model.safetensors").symlink_to("w.safetensors")
        folder = open_folder(single)
        assert folder.read("a").shape == (2, 3)

    @pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[0]])
    @pytest.mark.parametrize("absolute", [True, False])
    def test_out_of_the_folder(self, sharded: Path, tmp_path: Path, name: str, absolute: bool) -> None:
        (sharded / name).rename(tmp_path / name)
        (sharded / name).symlink_to(tmp_path / name if absolute else Path("..", name))
        with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder; put the file"):
            open_folder(sharded)

    def test_through_a_link_in_the_folder(self, single: Path, tmp_path: Path) -> None:
        (single / "model.safetensors").rename(tmp_path / "w.safetensors")
        (single / "sub").symlink_to(tmp_path)
        (single / "model.safetensors").symlink_to("sub/w.safetensors")
        with pytest.raises(CheckpointError, match=r"model.safetensors is a link out of its folder"):
            open_folder(single)

    @pytest.mark.parametrize("target", ["nowhere", "model.safetensors"])
    def test_to_nothing(self, single: Path, target: str) -> None:
        (single / "model.safetensors").unlink()
        (single / "model.safetensors").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"model.safetensors is a link to nothing"):
            open_folder(single)


@pytest.fixture
def cached(single: Path, tmp_path: Path) -> Path:
    """`single` as the hub's cache keeps it; returns the snapshot."""
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(single.iterdir())):
        file.rename(model / "blobs" / f"{number:040}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040}"))
    return snapshot


class TestHubCache:
    def test_links_to_blobs_are_followed(self, cached: Path, tmp_path: Path) -> None:
        (tmp_path / "main").symlink_to(cached)
        for path in (cached, tmp_path / "main"):
            assert torch.equal(open_folder(path).read("a"), torch.arange(6.0).view(2, 3))

    def test_not_to_other_models(self, cached: Path, tmp_path: Path) -> None:
        other = tmp_path / "hub" / "models--org--other" / "blobs"
        other.mkdir(parents=True)
        (cached / "model.safetensors").resolve().rename(other / "w")
        (cached / "model.safetensors").unlink()
        (cached / "model.safetensors").symlink_to(other / "w")
        with pytest.raises(CheckpointError, match=r"is a link out of its folder"):
            open_folder(cached)

    def test_not_below_or_beside_the_blobs(self, cached: Path) -> None:
        blobs = cached.parent.parent / "blobs"
        for place in (blobs / "sub", blobs.parent / "refs"):
            place.mkdir()
            target = (cached / "model.safetensors").resolve().rename(place / "w")
            (cached / "model.safetensors").unlink()
            (cached / "model.safetensors").symlink_to(target)
            with pytest.raises(CheckpointError, match=r"is a link out of its folder"):
                open_folder(cached)

    @pytest.mark.parametrize("renamed", ["models--org--name", "snapshots"])
    def test_not_in_folders_of_other_names(self, cached: Path, renamed: str) -> None:
        place = next(parent for parent in cached.parents if parent.name == renamed)
        place.rename(place.with_name("other"))
        moved = Path(str(cached).replace(f"/{renamed}/", "/other/"))
        with pytest.raises(CheckpointError, match=r"config.json is a link out of its folder"):
            open_folder(moved)


FLOATS = [name for name in TORCH_DTYPES if "F" in name]


def folder_of(path: Path, **tensors: torch.Tensor) -> Folder:
    (path / "config.json").write_text("{}")
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return open_folder(path)


class TestValues:
    def test_finite(self, tmp_path: Path) -> None:
        tensors = {f"x{name}": torch.ones(9).to(TORCH_DTYPES[name]) for name in FLOATS}
        tensors |= {"empty": torch.ones(0), "integer": torch.full((3,), -1, dtype=torch.int16)}
        folder, seen = folder_of(tmp_path, **tensors), []
        check_values(folder, folder.files, seen.append)
        assert sum(seen) == folder.nbytes

    @pytest.mark.parametrize("name", [name for name in FLOATS if TORCH_DTYPES[name].itemsize <= 2])
    def test_every_value_of_a_small_dtype(self, tmp_path: Path, name: str) -> None:
        dtype = TORCH_DTYPES[name]
        codes = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
        every = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
        bad = (~every.float().isfinite()).nonzero().flatten().tolist()
        assert bad
        folder = folder_of(tmp_path, every=every)
        message = f"tensor every: {len(bad)} of {len(codes)} values .* the first at flat index {bad[0]};"
        with pytest.raises(CheckpointError, match=message):
            check_values(folder, ["every"], lambda _: None)
        bits = every.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        good = bits[every.float().isfinite()].view(dtype)
        check_values(folder_of(tmp_path, every=good), ["every"], lambda _: None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
    def test_large_dtypes(self, tmp_path: Path, dtype: torch.dtype, value: float) -> None:
        extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0], dtype=dtype)
        check_values(folder_of(tmp_path, x=extremes), ["x"], lambda _: None)
        extremes[1] = value
        with pytest.raises(CheckpointError, match=r"x: 1 of 3 values .* at flat index 1;"):
            check_values(folder_of(tmp_path, x=extremes), ["x"], lambda _: None)

    def test_across_blocks(self, tmp_path: Path) -> None:
        x = torch.zeros(3, 600_001)
        x[1, 5] = float("nan")
        x[2, 600_000] = float("inf")
        blocks: list[int] = []
        folder = folder_of(tmp_path, fine=torch.zeros(3), x=x)
        with pytest.raises(CheckpointError, match=r"x: 2 of 1800003 values .* at flat index 600006;"):
            check_values(folder, ["fine", "x"], blocks.append)
        assert sum(blocks) == folder.nbytes
        assert max(blocks) <= 64 * 2**20
        assert len(blocks) > 3

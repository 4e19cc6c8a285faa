"""The safetensors container: the layout of the safetensors package, and no trust in any header."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint.safetensors import (
    ELEMENT_BITS,
    MAX_ENTRIES,
    MAX_HEADER_BYTES,
    TORCH_DTYPES,
    CheckpointError,
    layout,
    read_header,
    read_tensor,
    shown,
)

MEBI = 2**20


def container(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(data: bytes = bytes(8), **entries: Any) -> bytes:
    return container(json.dumps(entries).encode(), data)


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8)
    return (raw & 1 if dtype == torch.bool else raw).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    header = read_header(path)
    with path.open("rb") as file:
        return {name: read_tensor(file.fileno(), info) for name, info in header.tensors.items()}


ZOO = {
    **{f"t.{name}": (dtype, (3, 4)) for name, dtype in TORCH_DTYPES.items()},
    "scalar": (torch.float32, ()),
    "empty": (torch.float64, (0,)),
    "empty.inside": (torch.bfloat16, (3, 0, 5)),
    "": (torch.uint8, (7,)),
    'é"\\/\x01\x7f\n\t\u2028😀': (torch.float16, (2,)),
}


class TestLayout:
    def test_every_dtype_of_torch_is_known_by_its_size(self) -> None:
        assert set(TORCH_DTYPES) == set(ELEMENT_BITS) - {"F4", "F6_E2M3", "F6_E3M2"}
        assert all(8 * dtype.itemsize == ELEMENT_BITS[name] for name, dtype in TORCH_DTYPES.items())

    @pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {'ü"\n': "\u2028\\x00"}])
    def test_equals_save_file(self, tmp_path: Path, metadata: dict[str, str]) -> None:
        tensors = {name: filled(dtype, shape) for name, (dtype, shape) in ZOO.items()}
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata or None)
        header, places = layout(described(tensors), metadata)
        data = b"".join(bits(tensors[name]).numpy().tobytes() for name in places)
        assert (tmp_path / "a.safetensors").read_bytes() == header + data

    @settings(max_examples=60, deadline=None)
    @given(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
            st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
            max_size=8,
        )
    )
    def test_equals_save(self, given_tensors: dict[str, tuple[str, list[int]]]) -> None:
        given_tensors.pop("__metadata__", None)
        tensors = {name: filled(TORCH_DTYPES[d], tuple(shape)) for name, (d, shape) in given_tensors.items()}
        header, places = layout(described(tensors), {})
        data = b"".join(bits(tensors[name]).numpy().tobytes() for name in places)
        assert safetensors.torch.save(tensors) == header + data

    def test_places_are_those_that_read_header_finds(self, tmp_path: Path) -> None:
        wanted = {"b": ("F32", (2, 3)), "a": ("U8", (5,)), "c": ("F4", (2, 4)), "m": ("F6_E2M3", (4,))}
        header, places = layout(wanted, {"b": "2", "a": "1"})
        path = tmp_path / "a.safetensors"
        path.write_bytes(header + bytes(24 + 5 + 4 + 3))
        found = read_header(path)
        assert dict(found.tensors) == places
        assert found.metadata == {"a": "1", "b": "2"}
        assert (found.size, found.path) == (path.stat().st_size, path)
        assert found.digest == hashlib.sha256(header).hexdigest()
        assert [info.nbytes for info in found.tensors.values()] == [24, 5, 3, 4]

    def test_refuses_what_no_file_can_hold(self) -> None:
        with pytest.raises(ValueError, match=r"no dtype F7; known: U64"):
            layout({"a": ("F7", (2,))}, {})
        with pytest.raises(ValueError, match=r"F4 \[3\] does not fill whole bytes"):
            layout({"a": ("F4", (3,))}, {})
        with pytest.raises(ValueError, match="over the limit of 100 MB; write more, smaller files"):
            layout({"a": ("U8", (1,))}, {"x": "y" * MAX_HEADER_BYTES})


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


class TestRead:
    def test_reads_what_save_file_wrote(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        tensors = {name: filled(*zoo) for name, zoo in ZOO.items() if name}
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        found = read_all(path)
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(found[name]), bits(tensor))

    def test_tensors_may_lie_at_odd_places(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}
        path.write_bytes(packed(b"\x07" + torch.tensor([1.5]).numpy().tobytes(), **header))
        assert read_all(path)["b"].tolist() == [1.5]

    def test_a_piece_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As where a tensor is larger than what one call can read."""
        monkeypatch.setattr("fewbits.checkpoint.safetensors._READ_BYTES", 7)
        tensor = filled(torch.float32, (5, 11))
        safetensors.torch.save_file({"a": tensor}, tmp_path / "a.safetensors")
        assert torch.equal(bits(read_all(tmp_path / "a.safetensors")["a"]), bits(tensor))

    def test_a_file_cut_off_after_its_header_was_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"a": torch.ones(100), "b": torch.ones(3)}, path)
        header = read_header(path)
        os.truncate(path, header.tensors["a"].end - 12)
        with (
            path.open("rb") as file,
            pytest.raises(CheckpointError, match=r"x, tensor a: .* ends 12 bytes too"),
        ):
            read_tensor(file.fileno(), header.tensors["a"], "x")

    def test_a_dtype_that_torch_has_not(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(packed(bytes(3), a=entry("F6_E3M2", [4], [0, 3])))
        with pytest.raises(CheckpointError, match="tensor a: torch has no F6_E3M2"):
            read_all(path)

    def test_a_header_is_all_that_is_read(self, tmp_path: Path) -> None:
        """A file with a hole of a terabyte is as quick as any."""
        path = tmp_path / "a.safetensors"
        header, places = layout({"a": ("U8", (2**40,))}, {})
        path.write_bytes(header)
        os.truncate(path, places["a"].end)
        assert read_header(path).tensors["a"].nbytes == 2**40


DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]

HEADERS = {
    "nothing in it": (b"", r"has 0 bytes, too few"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", r"has 7 bytes, too few"),
    "header beyond the file": (container(b"{}")[:-1], r"takes 2 bytes and the file has 1 after"),
    "header over the cap": ((10**8 + 1).to_bytes(8, "little"), r"100000001 bytes is over the limit"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", r"18446744073709551615 bytes is over the limit"),
    "no header": (container(b""), r"does not begin with a brace"),
    "array": (container(b"[]"), r"does not begin with a brace"),
    "blank first": (container(b" {}"), r"does not begin with a brace"),
    "not UTF-8": (container(b'{"\xff":1}'), r"is not UTF-8 \(invalid start byte\)"),
    "cut JSON": (container(b'{"a":'), r"cannot be read as JSON \(Expecting value"),
    "two JSON values": (container(b"{}{}"), r"cannot be read as JSON \(Extra data"),
    "control character": (container(b'{"\x01":1}'), r"cannot be read as JSON \(Invalid control"),
    "deeply nested": (container(b'{"a":' + b"[" * 200_000), r"cannot be read as JSON \(.*recursion"),
    "a number of 5000 digits": (container(b'{"a":' + b"9" * 5000 + b"}"), r"read as JSON \(Exceeds"),
    "names twice": (container(b'{"a":{},"b":{},"a":{}}'), r"the name a stands twice in one object"),
    "keys twice": (container(b'{"a":{"dtype":"F32","dtype":"F32"}}'), r"the name dtype stands twice"),
    "half a character": (packed(**{"\ud800": entry()}), r"tensor '\\ud800': a tensor's name must be UTF-8"),
    "half a character in metadata": (packed(__metadata__={"a": "\udfff"}), r"__metadata__ does not map"),
    "metadata no object": (packed(__metadata__=[]), r"__metadata__ does not map names to texts"),
    "metadata null": (packed(__metadata__=None), r"__metadata__ does not map names to texts"),
    "metadata of numbers": (packed(__metadata__={"a": 1}), r"__metadata__ does not map names to texts"),
    "no name": (packed(**{"": entry()}), r"tensor '': a tensor's name must be UTF-8 text that is not empty"),
    "entry no object": (packed(a=3), r"tensor a: the entry must be exactly"),
    "entry without shape": (packed(a={"dtype": "F32", "data_offsets": [0, 8]}), r"must be exactly"),
    "entry with more": (packed(a=entry() | {"x": 1}), r"tensor a: the entry must be exactly"),
    "dtype unknown": (packed(a=entry("F31")), r"the dtype 'F31' is unknown; known: U64, "),
    "dtype in small letters": (packed(a=entry("f32")), r"the dtype 'f32' is unknown"),
    "dtype no text": (packed(a=entry(["F32"])), r"the dtype \['F32'\] is unknown"),
    "shape no list": (packed(a=entry(shape=2)), r"the shape 2 is no list of at most 64 sizes"),
    "shape of floats": (packed(a=entry(shape=[2.0])), r"the shape \[2.0\] is no list"),
    "shape of booleans": (packed(a=entry(shape=[2, True])), r"the shape \[2, True\] is no list"),
    "shape negative": (packed(a=entry(shape=[-1, -2])), r"the shape \[-1, -2\] is no list"),
    "shape absurd": (packed(a=entry(shape=[2**60])), r"the shape \[1152921504606846976\] is no list"),
    "shape overflows": (packed(a=entry(shape=[2**32, 2**32])), r"is no list .* under 2\*\*60 elements"),
    "shape overflows to its bytes": (packed(a=entry(shape=[2**31, 2**31, 4, 2])), r"under 2\*\*60 elements"),
    "shape overflows past a zero": (
        packed(b"", a=entry(shape=[2**40, 2**40, 0], offsets=[0, 0])),
        r"under 2\*\*60 elements",
    ),
    "shape of 65 dimensions": (packed(a=entry(shape=[1] * 64 + [2])), r"no list of at most 64 sizes"),
    "deep shape": (packed(a=entry(shape=DEEP)), r"the shape \[\[\["),
    "offsets no list": (packed(a=entry(offsets=8)), r"data_offsets 8 are no range"),
    "offsets of three": (packed(a=entry(offsets=[0, 8, 8])), r"data_offsets \[0, 8, 8\] are no range"),
    "offsets negative": (packed(a=entry(offsets=[-8, 0])), r"data_offsets \[-8, 0\] are no range"),
    "offsets backwards": (packed(a=entry(offsets=[8, 0])), r"data_offsets \[8, 0\] are no range"),
    "offsets of booleans": (packed(a=entry("U8", [1], [False, True])), r"data_offsets \[False, True\]"),
    "offsets absurd": (packed(a=entry(offsets=[2**60, 2**60 + 8])), r"data_offsets .* are no range"),
    "bytes too few for the shape": (packed(a=entry(shape=[3])), r"F32 \[3\] takes 12 bytes, .* give it 8"),
    "bytes too many for the shape": (packed(a=entry(shape=[1])), r"F32 \[1\] takes 4 bytes, .* give it 8"),
    "half a byte": (packed(bytes(2), a=entry("F4", [3], [0, 2])), r"F4 \[3\] takes 1.5 bytes"),
    "overlap": (packed(a=entry(), b=entry(offsets=[4, 12])), r"tensor b: overlaps the one before, it"),
    "the same bytes twice": (packed(a=entry(), b=entry()), r"tensor b: overlaps the one before"),
    "gap": (packed(bytes(20), a=entry(), b=entry(offsets=[12, 20])), r"tensor b: leaves a gap before it"),
    "gap in front": (packed(bytes(12), a=entry(offsets=[4, 12])), r"tensor a: leaves a gap before it"),
    "an empty tensor in another": (packed(a=entry(), b=entry(shape=[0], offsets=[4, 4])), r"b: overlaps"),
    "cut off": (packed(bytes(5), a=entry()), r"cut off: 3 of \d+ bytes are missing; get it again"),
    "tail": (packed(bytes(11), a=entry()), r"has 3 bytes more than its header says"),
    "tail without tensors": (packed(b"x"), r"has 1 bytes more than its header says"),
}  # fmt: skip


class TestHostileHeaders:
    @pytest.mark.parametrize("case", HEADERS)
    def test_refused(self, tmp_path: Path, case: str) -> None:
        content, message = HEADERS[case]
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path)
        assert str(caught.value).startswith("model.safetensors")
        assert re.search(r"; (get it again|the file is damaged|known: )", str(caught.value))
        assert len(str(caught.value)) < 600

    def test_too_many_entries(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        text = b",".join(b'"%d":{}' % number for number in range(MAX_ENTRIES + 2))
        path.write_bytes(container(b"{" + text + b"}"))
        with pytest.raises(CheckpointError, match="more than 1048576 entries"):
            read_header(path)

    @pytest.mark.parametrize("filler", [b"[],", b"0,", b"{},"])
    def test_a_header_that_swells_when_parsed(self, tmp_path: Path, filler: bytes) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(container(b'{"a":[' + filler * (9 * MEBI) + b"0]}"))
        with pytest.raises(CheckpointError, match="more than 1048576 entries"):
            read_header(path)

    def test_terminal_codes_in_names_are_not_passed_on(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(packed(**{"\x1b[2Jx": 1}))
        with pytest.raises(CheckpointError, match=r"tensor '\\x1b\[2Jx'"):
            read_header(path)

    def test_shown(self) -> None:
        assert shown("model.layers.0") == "model.layers.0"
        assert shown("Größe") == "Größe"
        assert shown("a\nb") == r"'a\nb'"
        assert shown("x" * 500) == "x" * 200 + "…"

    def test_no_regular_file(self, tmp_path: Path) -> None:
        """A pipe without a writer must not be waited for."""
        os.mkfifo(tmp_path / "pipe")
        for name in ("pipe", ""):
            errors: list[Exception] = []
            thread = threading.Thread(target=_collect, args=(tmp_path / name, errors), daemon=True)
            thread.start()
            thread.join(timeout=60)
            assert not thread.is_alive()
            assert isinstance(errors[0], CheckpointError)
            assert "is not a regular file" in str(errors[0])

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_header(tmp_path / "a.safetensors")


def _collect(path: Path, errors: list[Exception]) -> None:
    try:
        read_header(path)
    except Exception as error:
        errors.append(error)


def sound(tmp_path: Path) -> bytes:
    path = tmp_path / "sound.safetensors"
    tensors = {"a.weight": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.uint8), "s": torch.tensor(1.0)}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


def read_or_refuse(path: Path, content: bytes) -> bool:
    """Whether it could be read; then in full, and every tensor within the file."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    end = 8 + int.from_bytes(content[:8], "little")
    for info in header.tensors.values():
        assert info.start == end
        end = info.end
    assert end == len(content) == header.size
    for tensor in read_all(path).values():
        assert tensor.numel() * tensor.dtype.itemsize <= len(content)
    return True


class TestFuzz:
    def test_truncated_at_every_length(self, tmp_path: Path) -> None:
        whole = sound(tmp_path)
        path = tmp_path / "a.safetensors"
        assert read_or_refuse(path, whole)
        assert not any(read_or_refuse(path, whole[:length]) for length in range(len(whole)))

    def test_flipped_bits(self, tmp_path: Path) -> None:
        whole, path, chance = sound(tmp_path), tmp_path / "a.safetensors", random.Random(0)
        end = 8 + int.from_bytes(whole[:8], "little")
        read = 0
        for _ in range(3000):
            content = bytearray(whole)
            for _ in range(chance.choice((1, 1, 2, 5))):
                content[chance.randrange(end)] ^= 1 << chance.randrange(8)
            read += read_or_refuse(path, bytes(content))
        assert 0 < read < 3000

    values = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 2**64) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
    sizes = st.lists(st.integers(0, 9) | values, max_size=3)
    entries = st.fixed_dictionaries(
        {"dtype": st.sampled_from(sorted(ELEMENT_BITS)), "shape": sizes, "data_offsets": sizes}
    )

    @settings(max_examples=400, deadline=None)
    @given(st.dictionaries(st.text(max_size=3), entries | values, max_size=4), st.binary(max_size=24))
    def test_any_json(self, tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
        read_or_refuse(path, container(json.dumps(header).encode(), data))

    @settings(max_examples=400, deadline=None)
    @given(st.data())
    def test_changed_json(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        """A sound header of two tensors, with one value in it replaced."""
        header: Any = {"a": entry("U8", [2, 3], [0, 6]), "b": entry("F32", [2], [6, 14])}
        place = data.draw(st.sampled_from(["a", "b"]))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if key == "dtype":
            header[place][key] = data.draw(st.sampled_from(sorted(ELEMENT_BITS)) | self.values)
        else:
            header[place][key][data.draw(st.integers(0, len(header[place][key]) - 1))] = data.draw(
                st.integers(-1, 20) | self.values
            )
        path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
        read_or_refuse(path, container(json.dumps(header).encode(), bytes(14)))

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=64))
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
        read_or_refuse(path, content)
        read_or_refuse(path, container(content))

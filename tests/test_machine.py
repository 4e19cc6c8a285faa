"""Memory: pages of files that are forgotten, and pages of 2 MiB."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from fewbits import machine

PAGES = 64

needs_pagemap = pytest.mark.skipif(
    not Path("/proc/self/pagemap").is_file(), reason="only Linux tells which pages are a file's"
)


def mapped(path: Path) -> torch.Tensor:
    """Bytes of a new file, mapped privately as checkpoints are, and read once."""
    path.write_bytes(bytes(range(256)) * (PAGES * mmap.PAGESIZE // 256))
    tensor = torch.from_file(str(path), shared=False, size=PAGES * mmap.PAGESIZE, dtype=torch.uint8)
    tensor.sum()
    return tensor


def resident_pages(tensor: torch.Tensor) -> int:
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(tensor.data_ptr() // mmap.PAGESIZE * 8)
        return sum(flags >> 7 for flags in pagemap.read(8 * PAGES)[7::8])


@needs_pagemap
def test_pages_of_a_file_are_forgotten_and_come_back(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "file")
    before = tensor.clone()
    assert resident_pages(tensor) == PAGES
    assert machine.forget_file_pages(tensor.data_ptr(), tensor.nbytes)
    assert resident_pages(tensor) == 0
    assert torch.equal(tensor, before)


@needs_pagemap
def test_pages_that_belong_to_others_in_part_stay(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "file")
    inside = tensor[100 : 3 * mmap.PAGESIZE - 100]
    assert machine.forget_file_pages(inside.data_ptr(), inside.nbytes)
    assert resident_pages(tensor) == PAGES - 1
    assert not machine.forget_file_pages(tensor.data_ptr() + 1, mmap.PAGESIZE)


@needs_pagemap
def test_what_was_written_to_is_kept(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "file")
    tensor[5 * mmap.PAGESIZE] = 7  # this page is the process's own from here on
    assert not machine.forget_file_pages(tensor.data_ptr(), tensor.nbytes)
    assert tensor[5 * mmap.PAGESIZE] == 7


@needs_pagemap
def test_memory_of_no_file_is_kept() -> None:
    tensor = torch.arange(2**20)
    assert not machine.forget_file_pages(tensor.data_ptr(), tensor.nbytes)
    assert torch.equal(tensor, torch.arange(2**20))


def test_huge_pages_begin_on_one_and_hold_what_was_asked_for() -> None:
    memory, start = machine.huge_pages(3 * machine.HUGE_PAGE + 5)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start
    assert address % machine.HUGE_PAGE == 0
    memory[start + 3 * machine.HUGE_PAGE + 4] = 9
    assert start + 3 * machine.HUGE_PAGE + 5 <= len(memory)

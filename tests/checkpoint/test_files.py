"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fewbits.checkpoint import files

from .conftest import contents


class TestFiles:
    def test_a_failed_write_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def failing(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="full"):
            files.write_atomically(path, b"new")
        assert contents(tmp_path) == {"file": b"old"}

    def test_a_link_is_replaced_and_not_written_through(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("precious")
        (tmp_path / "link").symlink_to(target)
        files.write_atomically(tmp_path / "link", b"new")
        assert target.read_text() == "precious"
        assert (tmp_path / "link").read_text() == "new"
        assert not (tmp_path / "link").is_symlink()

    def test_exchange(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        if not files.exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this system cannot exchange two names")
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
        assert not files.exchange(tmp_path / "a", tmp_path / "nowhere")

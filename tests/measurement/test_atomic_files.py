"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hessian_callback.measurement.atomic_files import write_atomically


def test_the_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.csv", "ü\r\n\udcff")
    assert (tmp_path / "a" / "b.csv").read_bytes() == "ü\r\n\\udcff".encode()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.csv"]


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name in ("link", "dangling"):
        write_atomically(tmp_path / name, "text")
        assert not (tmp_path / name).is_symlink()
    assert precious.read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")

    def full(fileno: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "written", "text")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "usual").stat().st_mode

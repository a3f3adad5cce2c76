"""A file is there whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autocompress.files import atomic_path, cache_dir, write_once


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    for text in ("one", "two"):
        with atomic_path(path) as scratch:
            assert scratch.parent == path.parent
            scratch.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["plan.json"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(path) as scratch:  # noqa: PT012  # the block is the test
        scratch.write_text("new")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic") as scratch:
        scratch.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("AUTOCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "autocompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "autocompress"


def test_of_several_only_one_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profile.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: write_once(path, str(i)), range(8)))
    assert made.count(True) == 1
    assert path.read_text() == str(made.index(True))
    assert os.listdir(path.parent) == ["profile.json"]


def test_without_hard_links_a_file_is_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "profile.json"
    assert write_once(path, "one")
    assert not write_once(path, "two")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["profile.json"]

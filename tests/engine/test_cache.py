"""Cache folders: of users, and of processes that have no home."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from memedge.engine import cache

DIRECTORY = SimpleNamespace(path=Path("/engines/one"), identity="f" * 64)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache"),
        ({"HOME": "relative"}, None),
    ],
)
def test_folders(monkeypatch, environment, expected):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    own = () if expected is None else (Path(expected, "memedge", "f" * 32),)
    assert cache.folders(DIRECTORY) == (DIRECTORY.path, *own)


def test_without_a_home_the_engine_alone_is_left(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    assert cache.folders(DIRECTORY) == (DIRECTORY.path,)
    directory = SimpleNamespace(path=tmp_path, identity="f" * 64)
    assert list(cache.writable(directory)) == [tmp_path]


def test_a_cache_that_cannot_be_made_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    directory = SimpleNamespace(path=tmp_path / "engine", identity="f" * 64)
    for home in (tmp_path / "file", tmp_path / "loop", tmp_path / ("n" * 300)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert list(cache.writable(directory)) == [directory.path]

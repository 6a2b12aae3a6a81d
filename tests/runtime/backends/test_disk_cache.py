"""The user's cache folder: whole files, and a lock between processes."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamtalk import OutputError
from streamtalk.backends import disk_cache
from streamtalk.backends.disk_cache import (
    cache_directory,
    exclusive,
    locked,
    remember,
    remembered,
    replace_file,
)

HOLDER = """
import sys, time
from pathlib import Path
from streamtalk.backends.disk_cache import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
HELD_S = 0.6


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("STREAMTALK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "streamtalk"


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        replace_file(tmp_path / "file" / "x", b"")
    with pytest.raises(OutputError, match="STREAMTALK_CACHE"), locked(tmp_path / "file" / "x"):
        pass


def test_a_lock_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network folder without locks. What happens under a lock is another matter."""
    with pytest.raises(PermissionError), locked(tmp_path / "lock"):
        raise PermissionError

    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk_cache, "_lock", fails)
    with pytest.raises(OutputError, match=r"Cannot lock .*No locks available.*STREAMTALK_CACHE"):
        locked(tmp_path / "lock").__enter__()


def test_a_lock_holds_between_processes_and_falls_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen([*command, str(HELD_S)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        with locked(path):
            # Part of the time passed before the holder's line was read.
            assert time.monotonic() - began > HELD_S / 2
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
        holder.wait()
        with locked(path):
            pass


def test_a_directory_is_written_by_one_process_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with exclusive(tmp_path / "model"), exclusive(tmp_path / "other"):
        (lock, _) = sorted((tmp_path / "cache" / "builds").iterdir())
    # A link is the directory that it points to, which need not exist yet.
    with exclusive(tmp_path / "link"):
        assert len(list((tmp_path / "cache" / "builds").iterdir())) == 2
    assert lock.suffix == ".lock"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError), exclusive(tmp_path / "loop" / "model"):
        pass


def test_what_only_saves_time_never_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    assert remembered("kernels", "a") == b""
    for content in (b"old", b"new"):
        remember("kernels", "a", content)
        remember("kernels", "b", b"another")
        assert (remembered("kernels", "a"), remembered("timings", "a")) == (content, b"")
    (file, _) = (tmp_path / "cache" / "kernels").iterdir()
    file.unlink()
    file.mkdir()
    (tmp_path / "cache" / "timings").touch()
    for kind in ("kernels", "timings"):
        for key in ("a", "b", "c"):
            remember(kind, key, b"more")
            remembered(kind, key)

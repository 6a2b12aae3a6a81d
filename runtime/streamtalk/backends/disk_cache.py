"""Files kept between runs in the user's cache folder, written whole, and locks between processes."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from streamtalk.errors import OutputError

VARIABLE = "STREAMTALK_CACHE"


def cache_directory() -> Path:
    """Return `$STREAMTALK_CACHE`, else `streamtalk` in the user's cache folder. It may not exist yet."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(base) if base else Path.home() / ".cache") / "streamtalk"


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all, also for a process that reads it meanwhile. Raises OutputError."""
    building = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            building = file.name
            file.write(content)
        Path(building).replace(path)
    except OSError as error:
        if building:
            Path(building).unlink(missing_ok=True)
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error


def remembered(kind: str, key: str) -> bytes:
    """Return what `remember` stored; empty where there is nothing or it cannot be read."""
    with suppress(OSError):
        return _place(kind, key).read_bytes()
    return b""


def remember(kind: str, key: str, content: bytes) -> None:
    """Store something that only saves time: a folder that cannot be written is no error."""
    with suppress(OutputError):
        replace_file(_place(kind, key), content)


def _place(kind: str, key: str) -> Path:
    return cache_directory() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.bin"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, which ends with the process that holds it. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. Name a writable folder in {VARIABLE}."
        ) from error
    with file:
        try:
            _lock(file)
        except OSError as error:  # as on some network folders
            raise OutputError(
                f"Cannot lock {path}: {error.strerror or error}. Name a local folder in {VARIABLE}."
            ) from error
        yield


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep this user's other processes from writing the same model directory; waits for them. Raises OutputError.

    The directory need not exist.
    """
    try:
        path = str(directory.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise OutputError(f"{directory} cannot be followed: {error}. Name another directory.") from error
    with locked(cache_directory() / "builds" / f"{hashlib.sha256(path.encode()).hexdigest()}.lock"):
        yield


def _lock(file: IO[bytes]) -> None:
    """Wait for an exclusive lock, which closing the file releases."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined, unused-ignore]
            except OSError as error:
                if error.errno != errno.EDEADLK:  # it gave up waiting, after ten seconds
                    raise
            else:
                return
    fcntl.flock(file, fcntl.LOCK_EX)

"""A fake GPU, and a cache of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamtalk.backends.cuda.backend import CudaBackend
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.cuda.libraries import load_gpu
from tests.runtime.backends.probes import add_probe
from tests.runtime.toy import Toy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A toy model with graphs of one and three rows, and its probe."""
    toy = Toy(rows=(1, 3))
    directory = toy.write(tmp_path / "model")
    add_probe(directory, toy)
    return directory


@pytest.fixture
def load(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CudaBackend]:
    """`load(directory, kind)`: a backend on the fake GPU, `kind` being `tensorrt` or `onnxruntime`."""
    return lambda directory, kind="tensorrt": load_gpu(cuda, directory, monkeypatch, kind)

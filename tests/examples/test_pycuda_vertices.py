"""The PyCUDA example, with a PyCUDA and a GPU of host memory standing in."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import wave
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from streamtalk import Talker
from tests.runtime.backends.cuda.fake import FakeCuda, Stream
from tests.runtime.backends.cuda.libraries import load_gpu
from tests.runtime.backends.probes import add_probe
from tests.runtime.toy import Toy, speech

EXAMPLE = Path(__file__).parents[2] / "examples" / "pycuda_vertices.py"


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("pycuda_vertices", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((speech(8000) * 32767).astype("<i2").tobytes())
    return path


class PyCuda:
    """The part of PyCUDA that the example uses; kernels run on its one stream, as late as they may."""

    def __init__(self, stream: Any) -> None:
        self.turned: list[Any] = []
        self.stream = stream
        stream.handle, stream.synchronize = stream, stream.run

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = {name: ModuleType(f"pycuda.{name}") for name in ("driver", "compiler", "autoprimaryctx")}
        package: Any = ModuleType("pycuda")
        for name, module in modules.items():
            setattr(package, name, module)
            monkeypatch.setitem(sys.modules, f"pycuda.{name}", module)
        monkeypatch.setitem(sys.modules, "pycuda", package)
        driver: Any = modules["driver"]
        driver.Stream, driver.mem_alloc = lambda: self.stream, lambda size: np.zeros(size // 4, np.float32)
        driver.memcpy_dtoh = lambda target, source: np.copyto(target.reshape(-1), source)
        compiler: Any = modules["compiler"]
        compiler.SourceModule = lambda _: self

    def get_function(self, name: str) -> Any:
        assert name == "turn"
        return self.turn

    def turn(
        self, source: Any, target: Any, n: Any, angle: Any, *, block: Any, grid: Any, stream: Stream
    ) -> None:
        assert block[0] * grid[0] >= n
        assert abs(angle) <= 0.3

        def run() -> None:
            memory = (ctypes.c_float * (3 * int(n))).from_address(int(source))
            self.turned.append(np.ctypeslib.as_array(memory).reshape(-1, 3).copy())
            target[:] = self.turned[-1].reshape(-1)

        stream.put(run)


def test_every_frame_reaches_the_kernel_in_place(
    example: Any,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    toy, fake = Toy(), FakeCuda()
    model = toy.write(tmp_path / "model")
    add_probe(model, toy)
    gpu = load_gpu(fake, model, monkeypatch)
    with gpu.driver.current():
        pycuda = PyCuda(gpu.driver.stream())
    pycuda.install(monkeypatch)
    assert example.main(["--engine", str(model), "--wav", str(clip)]) == 0
    assert capsys.readouterr().out.startswith("15 frames on tensorrt; the last one is [")
    with Talker.load(model, "onnxruntime-cpu", threads=1).open() as stream:
        stream.push(example.read(clip))
        expected = [frame.vertices.copy() for frame in stream.flush()]
    assert np.array_equal(np.array(pycuda.turned), np.array(expected))


def test_what_is_missing_is_a_sentence(
    example: Any,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    arguments = ["--engine", str(Toy().write(tmp_path / "model")), "--wav", str(clip)]
    assert example.main(arguments) == 2
    assert "pip install pycuda" in capsys.readouterr().err
    PyCuda(Stream(1)).install(monkeypatch)
    assert example.main(arguments) == 2
    assert "download=False needs a GPU backend" in capsys.readouterr().err
    clip.write_bytes(b"RIFF")
    assert example.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")

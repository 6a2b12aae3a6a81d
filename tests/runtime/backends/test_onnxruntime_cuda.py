"""Sessions of onnxruntime on a GPU, with a onnxruntime and a GPU that stand in."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from streamtalk.backends import onnxruntime_cuda
from streamtalk.backends.onnxruntime_cuda import SEARCHES, CudaSession
from streamtalk.errors import BackendError
from streamtalk.manifest import FRAME, Precision, graph_key, read_manifest
from tests.runtime.cuda.fake import FakeDriver
from tests.runtime.toy import Toy


class Session(SimpleNamespace):
    """Its frame is in the traceback of what fails, as a real session's is."""

    def run_with_iobinding(self, *_: Any) -> None:
        self.failing()


class Runtime:
    """Loads any graph; runs fail where the search is one of `lacking`, all captured ones without `graphs`, and the
    next `spoilt` captured ones."""

    __version__ = "1.31.1"

    def __init__(self, lacking: tuple[str, ...] = (), graphs: bool = True, spoilt: int = 0) -> None:
        self.lacking, self.graphs, self.spoilt = lacking, graphs, spoilt
        self.searched, self.captured = list[str](), list[bool]()
        self.levels = list[int]()
        self.made = list[weakref.ref[Session]]()
        self.alive_before = list[int]()
        """How many of the sessions before each one were still there when it was loaded."""

    def set_default_logger_severity(self, level: int) -> None:
        self.levels.append(level)

    def SessionOptions(self) -> Any:  # noqa: N802 (onnxruntime's name)
        return SimpleNamespace()

    def RunOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_run_config_entry=lambda *_: None)

    def InferenceSession(self, path: str, options: Any, **given: Any) -> Any:  # noqa: N802
        del path, options
        ((_, settings),) = given["providers"]
        self.searched.append(settings["cudnn_conv_algo_search"])
        self.captured.append(settings["enable_cuda_graph"] == "1")
        search, captured = self.searched[-1], self.captured[-1]

        def run(*_: Any) -> None:
            if search in self.lacking or (captured and not self.graphs):
                raise RuntimeError(f"no valid engine configs of {search}")
            if captured and self.spoilt:
                self.spoilt -= 1
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")

        binding = SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)
        self.alive_before.append(sum(session() is not None for session in self.made))
        session = Session()
        session.get_providers = lambda: [onnxruntime_cuda.PROVIDER]
        session.get_inputs = session.get_outputs = list
        session.io_binding = lambda: binding
        session.failing = run
        self.made.append(weakref.ref(session))
        return session


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a session of the toy's frame graph on a driver."""
    directory = Toy().write(tmp_path / "engine")
    graph = read_manifest(directory).graphs[FRAME]
    monkeypatch.setattr(onnxruntime_cuda, "compare", lambda *_: None)

    def open_session(runtime: Runtime, driver: FakeDriver) -> CudaSession:
        return CudaSession(runtime, directory, graph, driver)

    return open_session


def test_the_fastest_kernels_are_taken_where_they_exist(opened: Any) -> None:
    runtime = Runtime()
    session = opened(runtime, FakeDriver())
    assert runtime.searched == [session.search] == [SEARCHES[0]]
    assert session.captured


def test_a_list_without_a_kernel_gives_way_to_the_next(opened: Any) -> None:
    runtime = Runtime(SEARCHES[:2])
    session = opened(runtime, FakeDriver())
    assert runtime.searched == list(SEARCHES)
    assert session.search == SEARCHES[2]


def test_what_cannot_be_captured_runs_kernel_by_kernel(opened: Any) -> None:
    runtime, driver = Runtime(graphs=False), FakeDriver()
    session = opened(runtime, driver)
    assert runtime.captured == [True, True, True, False]
    assert driver.calls.count("abandon") == 3  # what a failed capture leaves would fail the next
    assert (session.search, session.captured) == (SEARCHES[0], False)
    # What failed has given its memory back before another takes as much, without waiting for the collector.
    assert runtime.alive_before == [0, 0, 0, 0]
    assert sum(made() is not None for made in runtime.made) == 1


def test_a_capture_that_another_thread_spoilt_is_made_again(opened: Any) -> None:
    """Its session captures in CUDA's global mode: any thread that allocates meanwhile ends that."""
    runtime, driver = Runtime(spoilt=1), FakeDriver()
    session = opened(runtime, driver)
    assert (runtime.captured, session.search, session.captured) == ([True], SEARCHES[0], True)
    addresses = {t.name: 0 for t in (*session.graph.inputs, *session.graph.outputs)}
    with driver.current():
        runtime.spoilt = 1
        session.bind(addresses, driver.stream())
        runtime.spoilt = 2
        with pytest.raises(BackendError, match="stream is capturing"):
            session.bind(addresses, driver.stream())


def test_what_is_neither_captured_nor_in_the_first_list_runs_from_another(opened: Any) -> None:
    runtime = Runtime(SEARCHES[:1], graphs=False)
    session = opened(runtime, FakeDriver())
    assert runtime.captured == [True, True, True, False, False]
    assert (session.search, session.captured) == (SEARCHES[1], False)


def test_a_release_that_does_not_capture_is_not_asked_to(opened: Any) -> None:
    runtime = Runtime(SEARCHES)
    runtime.__version__ = "1.30.0"
    with pytest.raises(BackendError):
        opened(runtime, FakeDriver())
    assert runtime.captured == [False] * len(SEARCHES)


def test_what_no_list_can_run_is_said_and_nothing_is_left(opened: Any) -> None:
    driver = FakeDriver()
    with pytest.raises(BackendError, match="no valid engine configs of HEURISTIC"):
        opened(runtime := Runtime(SEARCHES), driver)
    assert not driver.handles
    assert not driver.memory
    assert not any(made() for made in runtime.made)


def test_it_is_quiet_while_it_tries_and_no_longer(opened: Any) -> None:
    runtime = Runtime(SEARCHES[:1])
    opened(runtime, FakeDriver())
    assert runtime.levels == [onnxruntime_cuda.FATAL, onnxruntime_cuda.WARNING]


@pytest.mark.parametrize("form", onnxruntime_cuda.FORMS)
def test_the_graphs_of_the_form_that_is_asked_for(
    form: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Toy().write(tmp_path / "engine")
    manifest = read_manifest(directory)
    more = {
        graph_key(name, other): msgspec.structs.replace(graph, precision=other)
        for name, graph in manifest.graphs.items()
        for other in onnxruntime_cuda.FORMS
    }
    manifest = msgspec.structs.replace(manifest, graphs={**manifest.graphs, **more})
    monkeypatch.setattr(onnxruntime_cuda, "compare", lambda *_: None)
    monkeypatch.setattr(onnxruntime_cuda, "open_driver", FakeDriver)
    monkeypatch.setattr(onnxruntime_cuda, "_onnxruntime", Runtime)
    backend = onnxruntime_cuda.load(directory, manifest, form)
    assert (backend.encoder.graph.precision, backend.frame.graph.precision) == (form, form)
    # By which the probe's limits are kept.
    assert backend.precision == ("fp32" if form == "fp32" else "fp16")
    assert ("its own operators" in backend.description) == (form == "fused")

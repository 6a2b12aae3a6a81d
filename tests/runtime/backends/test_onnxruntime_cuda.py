"""Sessions of onnxruntime on a GPU, with a onnxruntime and a GPU that stand in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamtalk.backends import onnxruntime_cuda
from streamtalk.backends.onnxruntime_cuda import SEARCHES, CudaSession
from streamtalk.errors import BackendError
from streamtalk.manifest import FRAME, read_manifest
from tests.runtime.cuda.fake import FakeDriver
from tests.runtime.toy import Toy


class Runtime:
    """Loads any graph; runs fail where the search is one of `lacking`, and all captured ones without `graphs`."""

    __version__ = "1.31.1"

    def __init__(self, lacking: tuple[str, ...] = (), graphs: bool = True) -> None:
        self.lacking, self.graphs = lacking, graphs
        self.searched, self.captured = list[str](), list[bool]()

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
                raise RuntimeError("no valid engine configs")

        binding = SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)
        return SimpleNamespace(
            get_providers=lambda: [onnxruntime_cuda.PROVIDER],
            get_inputs=list,
            get_outputs=list,
            io_binding=lambda: binding,
            run_with_iobinding=run,
        )


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a session of the toy's frame graph, and a run of it."""
    directory = Toy().write(tmp_path / "engine")
    graph = read_manifest(directory).graphs[FRAME]
    monkeypatch.setattr(onnxruntime_cuda, "compare", lambda *_: None)
    driver = FakeDriver()

    def open_session(runtime: Runtime) -> tuple[CudaSession, Any, FakeDriver]:
        session = CudaSession(runtime, directory, graph, driver)
        addresses = {t.name: 256 for t in (*graph.inputs, *graph.outputs)}
        with driver.current():
            stream = driver.stream()
            return session, lambda: session.bind(addresses, stream), driver

    return open_session


def test_the_fastest_kernels_are_taken_where_they_exist(opened: Any) -> None:
    runtime = Runtime()
    _, bind, driver = opened(runtime)
    with driver.current():
        bind()
    assert runtime.searched == [SEARCHES[0]]


def test_a_list_without_a_kernel_gives_way_to_the_next(opened: Any) -> None:
    runtime = Runtime(SEARCHES[:2])
    _, bind, driver = opened(runtime)
    with driver.current():
        bind()
        bind()
    assert runtime.searched == list(SEARCHES)


def test_what_cannot_be_captured_runs_kernel_by_kernel(opened: Any) -> None:
    runtime = Runtime(graphs=False)
    _, bind, driver = opened(runtime)
    with driver.current():
        bind()
    assert runtime.captured == [True, True, True, False]
    assert runtime.searched[-1] == SEARCHES[0]


def test_what_no_list_can_run_is_said_and_nothing_is_left(opened: Any) -> None:
    _, bind, driver = opened(Runtime(SEARCHES))
    before = len(driver.handles)
    with driver.current(), pytest.raises(BackendError, match="no valid engine configs"):
        bind()
    assert len(driver.handles) == before


def test_a_run_that_fails_later_loads_nothing_again(opened: Any) -> None:
    runtime = Runtime()
    _, bind, driver = opened(runtime)
    with driver.current():
        bind()
        runtime.lacking = SEARCHES
        with pytest.raises(BackendError):
            bind()
    assert runtime.searched == [SEARCHES[0]]

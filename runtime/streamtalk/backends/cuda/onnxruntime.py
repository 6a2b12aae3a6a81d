"""Hop graphs in onnxruntime on an NVIDIA GPU, where no TensorRT runs.

onnxruntime captures its own CUDA graphs, one for each number it is given, so its runs stay outside the rows' capture:
a hop is an upload, a graph launch and a download, one after the other. Releases before `GRAPHS_FROM` do not capture
here: their replays could read host memory that was given to something else (onnxruntime's pull request 32121).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.buffers import Plan
from streamtalk.backends.cuda.driver import Driver, Handle, open_driver
from streamtalk.backends.onnxruntime import bind, first_line, hop_graph, open_session
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.model import Graph, Manifest, Precision, graph_key, hop_name

NAME = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
WARNING, FATAL = 2, 4
"""Levels of onnxruntime's loggers."""
GRAPHS_FROM = (1, 31, 1)
"""The first release whose captured graphs were seen to keep what they read."""
SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")
"""cuDNN's lists of convolution kernels: the first knows the fastest, the last is slow and has all."""
SETTINGS = tuple((search, captured) for captured in (True, False) for search in SEARCHES)
"""What a session is loaded with, until one has a kernel for every node. A graph that works with no list is tried again
without a capture: a batch of 512 at full size could not be captured (onnxruntime 1.31, H200).
"""
LIBRARIES = ("nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-runtime")
"""Beginnings of the names of the packages whose kernels are run, besides onnxruntime's own."""


def load(directory: Path, manifest: Manifest, precision: Precision, threads: int) -> CudaBackend:
    """Load the hop graph of one row on one GPU. Raises BackendError, MissingDependencyError and ModelError."""
    del threads
    runtime = _onnxruntime()
    driver = open_driver()
    if not driver.primary:
        raise BackendError(
            f"{NAME} works in the GPU's primary context only, and another one is current: with PyCUDA import "
            "pycuda.autoprimaryctx, or use a TensorRT backend."
        )
    load_rows = partial(_load, runtime, driver, directory, manifest, precision)
    session = load_rows(1)
    how = "" if session.captured else ", kernel by kernel"
    kind = precision if session.graph.operators == "onnx" else f"{precision} in its own operators"
    description = f"onnxruntime {runtime.__version__}{how}, {kind}, {driver.description}"
    return CudaBackend(
        name=NAME,
        description=description,
        fingerprint="; ".join([description, driver.build, *libraries(), session.fingerprint]),
        precision=precision,
        driver=driver,
        directory=directory,
        manifest=manifest,
        load=load_rows,
        engines={1: session},
    )


def captures(version: str) -> bool:
    """Whether this release of onnxruntime captures CUDA graphs that can be replayed safely."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= GRAPHS_FROM


def libraries() -> list[str]:
    """Name and version of the installed packages that onnxruntime takes its kernels from."""
    found = ((d.metadata["Name"] or "", d.version) for d in metadata.distributions())
    return sorted({f"{name} {version}" for name, version in found if name.startswith(LIBRARIES)})


def _load(
    runtime: Any, driver: Driver, directory: Path, manifest: Manifest, precision: Precision, rows: int
) -> CudaSession:
    """A session of the hop graph in onnxruntime's own operators, where the model has that, or else in ONNX's."""
    own = manifest.graphs.get(graph_key(hop_name(rows), precision, "onnxruntime"))
    return CudaSession(runtime, directory, own or hop_graph(manifest, rows, precision), driver)


class CudaSession:
    """See `engine.DeviceEngine`: a session on a stream of its own, which all its runs share.

    onnxruntime captures on that stream in CUDA's global mode, so nothing else may ever be put on it: a copy of other
    rows would become part of the captured graph.
    """

    capturable = False

    def __init__(self, runtime: Any, directory: Path, graph: Graph, driver: Driver) -> None:
        self.runtime, self.graph, self.driver = runtime, graph, driver
        self.lock = Lock()
        self.numbers = itertools.count(1)
        self.session: Any = None
        self.search, self.captured = SETTINGS[-1]
        """What it was loaded with."""
        with driver.current(), _quiet(runtime):
            self.stream: Handle = driver.stream()
            try:
                self._load(directory)
            except BaseException:
                self.session = None
                driver.discard(self.stream)
                raise
        self.fingerprint = f"{graph.sha256}, {self.search}, captured {self.captured}"

    def _load(self, directory: Path) -> None:
        """Load with the first settings that work. Only a run shows whether cuDNN has every kernel and whether it can
        be captured.
        """
        # Only their messages: an error holds the frames that it passed through, and so its session's memory.
        failures: list[str] = []
        may_capture = captures(self.runtime.__version__)
        for self.search, self.captured in SETTINGS:
            if self.captured and not may_capture:
                continue
            self.session = None  # before another takes as much memory
            try:
                self.session = self._open(directory)
                self._try()
                return
            except BackendError as error:
                failures.append(str(error))
        first, last = failures[0], failures[-1]
        raise BackendError(first if last == first else f"{first} In another way: {last}")

    def _open(self, directory: Path) -> Any:
        options = self.runtime.SessionOptions()
        options.log_severity_level = FATAL
        provider = {
            "device_id": str(self.driver.device),
            "user_compute_stream": str(int(self.stream)),
            "enable_cuda_graph": str(int(self.captured)),
            # TF32 has float16's mantissa: left on, it would undo every float32 island.
            "use_tf32": "0",
            "cudnn_conv_algo_search": self.search,
            # Convolutions keep channels last, as cuDNN's kernels want them, and their weights so from the start.
            "prefer_nhwc": "1",
            # Flash and memory-efficient attention. cuDNN's, which would come first on Hopper, took 6 us more a call.
            "sdpa_kernel": "3",
            # LayerNorm of a sum in float32, as the certificate has it; not every release does so by itself.
            "enable_skip_layer_norm_strict_mode": "1",
        }
        # Without the fallback, which would print to stdout and hand out a session on the CPU.
        settings = {"providers": [(PROVIDER, provider)], "enable_fallback": 0}
        session = open_session(self.runtime, directory, self.graph, options, **settings)
        if PROVIDER not in session.get_providers():
            raise BackendError(
                f"onnxruntime {self.runtime.__version__} cannot start {PROVIDER} here; its CUDA and cuDNN libraries "
                "are missing or of another version: pip install 'streamtalk[gpu]' brings them."
            )
        return session

    def _try(self) -> None:
        """Bind and run on memory of its own, on a stream of its own."""
        driver = self.driver
        plan = Plan.of((*self.graph.inputs, *self.graph.outputs))
        stream = driver.stream()
        try:
            base = driver.device_memory(plan.total)
            try:
                driver.clear(base, plan.total, stream)
                self.bind(plan.addresses(base), stream).close()
            finally:
                for used in (stream, self.stream):
                    with suppress(BackendError):  # of a device that failed before
                        driver.drain(used)
                driver.free(base)
        finally:
            driver.discard(stream)

    def bind(self, addresses: Mapping[str, int], stream: Handle) -> CudaSessionRun:
        """Bind device addresses; the first runs allocate and capture, a second time where a call of another thread's
        to CUDA may have spoilt the capture."""
        try:
            return self._bound(addresses, stream)
        except BackendError as error:
            if not self.captured or "captur" not in str(error):
                raise
        return self._bound(addresses, stream)

    def _bound(self, addresses: Mapping[str, int], stream: Handle) -> CudaSessionRun:
        io = bind(self.session, self.graph, addresses, "cuda", self.driver.device)
        run = CudaSessionRun(self, io, next(self.numbers))
        try:
            # One to allocate, one to capture, one to replay: whatever fails does so here.
            for _ in range(3):
                run.enqueue(stream)
            self.driver.drain(stream)
        except BaseException:
            run.close()
            raise
        return run


class CudaSessionRun:
    """A binding with its own captured graph, ordered with the rows' stream by two events.

    onnxruntime keeps captured graphs by thread: rows that are used in another thread than they were opened in capture
    again there, in their first hops.
    """

    def __init__(self, session: CudaSession, io: Any, number: int) -> None:
        self._session, self._io, self._number = session, io, number
        self._options = session.runtime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        # The rows wait for an event, asleep; without this the run would wait by spinning.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._ready, self._finished = session.driver.event(), session.driver.event()

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the session's stream, after what is on `stream` and before what comes there."""
        session, driver = self._session, self._session.driver
        driver.record(self._ready, stream)
        with session.lock:
            driver.wait(session.stream, self._ready)
            try:
                session.session.run_with_iobinding(self._io, self._options)
            except Exception as error:  # onnxruntime's own errors share no base class
                driver.abandon(session.stream)  # which it leaves capturing where an operator fails
                raise BackendError(f"onnxruntime failed on the GPU: {first_line(error)}") from error
            driver.record(self._finished, session.stream)
        driver.wait(stream, self._finished)

    def close(self) -> None:
        """Let the binding go, and the captured graph where onnxruntime can; before 1.32 it keeps that as long as the
        session.
        """
        self._io = None
        release = getattr(self._session.session, "release_captured_graph", None)
        if release is not None:
            with self._session.lock, suppress(Exception):  # onnxruntime's own errors share no base class
                release(self._number)
        for event in (self._ready, self._finished):
            self._session.driver.discard(event)


@contextmanager
def _quiet(runtime: Any) -> Iterator[None]:
    """Log no line for every kernel that was tried in vain: the last failure is raised, with its message."""
    runtime.set_default_logger_severity(FATAL)
    try:
        yield
    finally:
        runtime.set_default_logger_severity(WARNING)  # its default; it has no function that reads it


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"{NAME} needs the package onnxruntime-gpu: pip install 'streamtalk[gpu]'. ({error})"
        ) from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"{NAME} needs onnxruntime-gpu; installed is an onnxruntime without {PROVIDER}. Uninstall it first, "
            "then pip install 'streamtalk[gpu]': the two overwrite each other."
        )
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(sys.stderr):  # where it lists what it did not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN as wheels, which no loader would find
    return onnxruntime

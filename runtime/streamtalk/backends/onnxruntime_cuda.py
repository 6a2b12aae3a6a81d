"""The graphs in onnxruntime on an NVIDIA GPU, where no TensorRT runs.

onnxruntime captures its own CUDA graphs, one for each number it is given, so its runs stay outside the lane's
capture: a frame is an upload, a graph launch and a download, one after the other. Releases before `GRAPHS_FROM` do not
capture here: their replays could read host memory that was given to something else (onnxruntime's pull request 32121).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

from streamtalk.backends.contract import compare, declared
from streamtalk.backends.onnxruntime_cpu import first_line, tensors_of
from streamtalk.cuda.backend import CudaBackend
from streamtalk.cuda.driver import Driver, Handle, open_driver
from streamtalk.cuda.engine import Plan, size_bytes
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Graph, Manifest, Precision, graph_key, verified_graph

NAME = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
FORMS: tuple[Precision, ...] = ("fused", "fp16", "fp32")
"""Which graphs to run, the first that an export has."""
WARNING, FATAL = 2, 4
"""Levels of onnxruntime's loggers."""
GRAPHS_FROM = (1, 31, 1)
"""The first release whose captured graphs were seen to keep what they read."""
SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")
"""Which of cuDNN's lists of convolution kernels to take from, until one has something for every node: the first knows
the fastest, the last is slow and has all. What works with none is tried with each again without a captured graph:
a batch of 512 at full size could not be captured (onnxruntime 1.31, H200).
"""
LIBRARIES = ("nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-runtime")
"""Beginnings of the names of the packages whose kernels are run, besides onnxruntime's own."""


def load(directory: Path, manifest: Manifest, form: Precision) -> CudaBackend:
    """Sessions of the audio encoder and the frame graph, one of the `FORMS`, on one GPU. Raises BackendError,
    MissingDependencyError and ModelError.
    """
    runtime = _onnxruntime()
    driver = open_driver()
    if not driver.primary:
        raise BackendError(
            f"{NAME} works in the GPU's primary context only, and another one is current: with PyCUDA import "
            "pycuda.autoprimaryctx, or use a TensorRT backend."
        )
    precision: Precision = "fp32" if form == "fp32" else "fp16"
    graphs = [manifest.graphs[graph_key(name, form)] for name in (AUDIO_ENCODER, FRAME)]
    encoder, frame = (CudaSession(runtime, directory, graph, driver) for graph in graphs)
    how = "" if encoder.captured and frame.captured else ", kernel by kernel"
    kind = "fp16 in its own operators" if form == "fused" else manifest.told(form)
    description = f"onnxruntime {runtime.__version__}{how}, {kind}, {driver.description}"
    settings = [f"{session.search}, captured {session.captured}" for session in (encoder, frame)]
    fingerprint = "; ".join([description, driver.build, *settings, *libraries(), *(g.sha256 for g in graphs)])
    return CudaBackend(NAME, description, fingerprint, precision, driver, encoder, frame, manifest)


def captures(version: str) -> bool:
    """Whether this release of onnxruntime captures CUDA graphs that can be replayed safely."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= GRAPHS_FROM


def libraries() -> list[str]:
    """Name and version of the installed packages that onnxruntime takes its kernels from."""
    found = ((d.metadata["Name"] or "", d.version) for d in metadata.distributions())
    return sorted({f"{name} {version}" for name, version in found if name.startswith(LIBRARIES)})


class CudaSession:
    """See `engine.DeviceEngine`: a session on a stream of its own, which all its runs share.

    onnxruntime captures on that stream in CUDA's global mode, so nothing else may ever be put on it: a copy of another
    lane's would become part of the captured graph.
    """

    capturable = False

    def __init__(self, runtime: Any, directory: Path, graph: Graph, driver: Driver) -> None:
        self.runtime, self.graph, self.driver = runtime, graph, driver
        self.stream: Handle = driver.stream()
        self.lock = Lock()
        self.numbers = itertools.count(1)
        path = verified_graph(directory, graph)
        self.session: Any = None
        self.search, self.captured = "", False
        """What it was loaded with."""
        try:
            with driver.current(), _quiet(runtime):
                self._settle(path)
        except BaseException:
            self.session = None
            driver.discard([self.stream])
            raise

    def _settle(self, path: Path) -> None:
        """Load with the first settings that work: what cuDNN has no kernel for, or what cannot be captured, shows in a
        run alone. The run is on memory of its own.
        """
        driver, tensors = self.driver, (*self.graph.inputs, *self.graph.outputs)
        plan = Plan.of({tensor.name: size_bytes(tensor) for tensor in tensors})
        base, stream = driver.device_memory(plan.total), driver.stream()
        addresses = {name: base + offset for name, offset in plan.offsets.items()}
        capturing = captures(self.runtime.__version__)
        settings = [(search, capturing) for search in SEARCHES]
        settings += [(search, False) for search in SEARCHES] if capturing else []
        # Their words alone: an error holds the frames that it passed through, and with them its session's memory.
        failures: list[str] = []
        try:
            driver.clear(base, plan.total, stream)
            for self.search, self.captured in settings:
                self.session = None  # before another takes as much memory
                try:
                    self._load(path)
                    self.bind(addresses, stream).close()
                    return
                except BackendError as error:
                    failures.append(str(error))
            first, last = failures[0], failures[-1]
            raise BackendError(first if last == first else f"{first} In another way: {last}")
        finally:
            for used in (stream, self.stream):
                with suppress(BackendError):  # of a device that failed before
                    driver.drain(used)
            driver.discard([stream])
            driver.release([base])

    def _load(self, path: Path) -> None:
        runtime, driver = self.runtime, self.driver
        options = runtime.SessionOptions()
        options.log_severity_level = FATAL
        provider = {
            "device_id": str(driver.device),
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
        try:
            # In the driver's context, where a capture in another thread does not forbid to allocate. Without the
            # fallback, which would print to stdout and hand out a session on the CPU.
            with driver.current():
                self.session = runtime.InferenceSession(
                    str(path), options, providers=[(PROVIDER, provider)], enable_fallback=0
                )
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BackendError(
                f"onnxruntime {runtime.__version__} cannot load {path}: {first_line(error)}"
            ) from error
        if PROVIDER not in self.session.get_providers():
            raise BackendError(
                f"onnxruntime {runtime.__version__} cannot start {PROVIDER} here; its CUDA and cuDNN libraries "
                "are missing or of another version: pip install 'streamtalk[gpu]' brings them."
            )
        want_inputs, want_outputs = declared(self.graph)
        compare(f"The inputs of {path}", want_inputs, tensors_of(self.session.get_inputs()))
        compare(f"The outputs of {path}", want_outputs, tensors_of(self.session.get_outputs()))

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
        io = self.session.io_binding()
        for tensors, bound in ((self.graph.inputs, io.bind_input), (self.graph.outputs, io.bind_output)):
            for t in tensors:
                bound(t.name, "cuda", self.driver.device, t.dtype, list(t.shape), addresses[t.name])
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
    """A binding with its own captured graph, ordered with the lane's stream by two events.

    onnxruntime keeps captured graphs by thread: a lane that is used in another thread than it was opened in captures
    again there, in its first frames.
    """

    def __init__(self, session: CudaSession, io: Any, number: int) -> None:
        self._session, self._io, self._number = session, io, number
        self._options = session.runtime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        # The lane waits with an event that sleeps; without this the run would wait by spinning.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        self._asked, self._answered = session.driver.event(), session.driver.event()

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the session's stream, after what is on `stream` and before what comes there."""
        session, driver = self._session, self._session.driver
        driver.record(self._asked, stream)
        with session.lock:
            driver.wait(session.stream, self._asked)
            try:
                session.session.run_with_iobinding(self._io, self._options)
            except Exception as error:  # onnxruntime's own errors share no base class
                driver.abandon(session.stream)  # which it leaves capturing where an operator fails
                raise BackendError(f"onnxruntime failed on the GPU: {first_line(error)}") from error
            driver.record(self._answered, session.stream)
        driver.wait(stream, self._answered)

    def close(self) -> None:
        """Let the binding go, and the captured graph where onnxruntime can; before 1.32 it keeps that as long as the
        session.
        """
        self._io = None
        release = getattr(self._session.session, "release_captured_graph", None)
        if release is not None:
            with self._session.lock, suppress(Exception):  # onnxruntime's own errors share no base class
                release(self._number)
        self._session.driver.discard([self._asked, self._answered])


@contextmanager
def _quiet(runtime: Any) -> Iterator[None]:
    """Without a line for every kernel that was tried in vain: what fails in the end is raised, in its words."""
    runtime.set_default_logger_severity(FATAL)
    try:
        yield
    finally:
        runtime.set_default_logger_severity(WARNING)  # which it starts with; it does not tell what it has


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
        with redirect_stdout(sys.stderr):  # where it says what it did not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN as wheels, which no loader would find
    return onnxruntime

"""TensorRT engines from a model's graphs, built on the device: this needs neither torch nor the exporter.

Classic TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds without a GPU, for any compute
capability that it knows. Both parse the same strongly typed graphs.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from streamtalk.backends.cuda.driver import Driver, open_driver
from streamtalk.backends.cuda.tensorrt import NO_REASON, Library
from streamtalk.backends.disk_cache import exclusive, remember, remembered
from streamtalk.backends.engine_file import RTX, RTX_HEADER_BYTES, read_rtx_header
from streamtalk.errors import (
    BackendError,
    ModelError,
    OutputError,
    StreamTalkError,
    UsageError,
)
from streamtalk.model import (
    FILE_NAME,
    Engine,
    Graph,
    Manifest,
    Precision,
    graph_key,
    hop_name,
    is_hop,
    read_manifest,
    sha256_of,
    verified,
    verified_graph,
    write_manifest,
)
from streamtalk.signals import signals_after

Say = Callable[[str], None]
Working = Callable[[str], AbstractContextManager[None]]
Backend = Literal["tensorrt", "tensorrt_rtx"]

BACKENDS: tuple[Backend, ...] = ("tensorrt", RTX)

TIMINGS = "timings"
BUILDING = ".engines."
"""Prefix of the folders that engines are built in, inside the model's directory."""


def build_engines(
    directory: Path,
    backend: str,
    precision: Precision | None = None,
    compute_capabilities: Sequence[int] = (),
    graphs: Collection[str] | None = None,
    say: Say = lambda _: None,
    working: Working = lambda _: nullcontext(),
    lock: bool = True,
) -> Manifest:
    """Build engines of an exported model for `backend`, put them in place and return the new manifest.

    Builds every hop graph of `precision` (None: fp16 where the model has it, else fp32), or the keys of
    `Manifest.graphs` in `graphs`. `compute_capabilities`, such as 86 for 8.6, are for `tensorrt_rtx`; none means all
    that it knows. Engines and manifest change together when all are built; until then the directory stays as it is.
    One process at a time builds in a directory.

    `say` takes a line for each engine. `working` gives a context in which one engine is built. `lock` is False for a
    directory that is still being written: no other process knows it.

    Raises UsageError, ModelError, MissingDependencyError, BackendError or OutputError.
    """
    try:
        with exclusive(directory) if lock else nullcontext():
            manifest = read_manifest(directory)
            chosen = _chosen(directory, manifest, precision, graphs)
            builder = Builder(backend, compute_capabilities)
            return _build(directory, manifest, chosen, builder, say, working)
    except StreamTalkError:  # OutputError is an OSError too
        raise
    except OSError as error:
        raise OutputError(f"Building engines in {directory} failed: {error.strerror or error}.") from error


def check_builder(backend: str, compute_capabilities: Sequence[int] = ()) -> None:
    """Check that `build_engines` can start: library, compute capabilities, and a driver where it needs one.

    Raises UsageError, MissingDependencyError or BackendError.
    """
    Builder(backend, compute_capabilities)


def installed_backend() -> Backend:
    """Return `tensorrt` where that can be imported, else `tensorrt_rtx`."""
    try:
        importlib.import_module("tensorrt")
    except (ImportError, OSError):  # OSError: one of its own libraries is missing
        return RTX
    return "tensorrt"


def _chosen(
    directory: Path, manifest: Manifest, precision: Precision | None, keys: Collection[str] | None
) -> dict[str, Graph]:
    """Return the graphs to build, by their keys in the manifest, after their files were verified."""
    if keys is None:
        if precision is None:
            precision = "fp16" if graph_key(hop_name(1), "fp16") in manifest.graphs else "fp32"
        graphs = manifest.graphs.items()
        chosen = {
            key: graph
            for key, graph in graphs
            if is_hop(key) and (graph.precision, graph.operators) == (precision, "onnx")
        }
        if not chosen:
            raise ModelError(
                f"{directory} has no {precision} hop graphs. Export it with --precision {precision} first."
            )
    else:
        if unknown := sorted(set(keys) - manifest.graphs.keys()):
            raise UsageError(
                f"{directory} has no graph {', '.join(unknown)}. It has: {', '.join(manifest.graphs)}."
            )
        chosen = {key: manifest.graphs[key] for key in keys}
    for key, graph in chosen.items():
        if precision not in (None, graph.precision):
            raise UsageError(f"Graph {key} is {graph.precision}, not {precision}. Leave the precision out.")
        if graph.operators != "onnx":
            raise UsageError(
                f"Graph {key} uses operators of {graph.operators}, which no TensorRT parses. "
                f"Build {key.removesuffix(f'.{graph.operators}')}."
            )
        if any(isinstance(n, str) for tensor in graph.inputs for n in tensor.shape):
            raise UsageError(f"Graph {key} takes inputs of any length; engines are built of fixed shapes.")
        verified_graph(directory, graph)
    return chosen


def _build(
    directory: Path,
    manifest: Manifest,
    graphs: dict[str, Graph],
    builder: Builder,
    say: Say,
    working: Working,
) -> Manifest:
    for left in directory.glob(f"{BUILDING}*"):  # by a build that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=BUILDING) as name:
        building = Path(name)
        built = []
        for key, graph in graphs.items():
            began = time.perf_counter()
            with working(f"Building {graph.file} for {builder.backend}"):
                built.append(engine := builder.build(directory, key, graph, building))
            size_mb = (building / engine.file).stat().st_size / 1e6
            say(f"{engine.file:40} {size_mb:8.1f} MB  {time.perf_counter() - began:5.1f} s")
        kept = [engine for engine in manifest.engines if _stays(directory, engine, built)]
        manifest = msgspec.structs.replace(manifest, engines=(*kept, *built))
        write_manifest(building, manifest)
        with signals_after():
            for engine in built:
                (building / engine.file).replace(directory / engine.file)
            (building / FILE_NAME).replace(directory / FILE_NAME)
    return manifest


def _stays(directory: Path, engine: Engine, built: Sequence[Engine]) -> bool:
    """Whether an older engine stays listed: no new one replaces it, and its file is unchanged."""
    kind = (engine.graph, engine.backend, engine.precision)
    if any((e.graph, e.backend, e.precision) == kind or e.file == engine.file for e in built):
        return False
    try:
        verified(directory, engine.file, engine.sha256)
    except ModelError:
        return False
    return True


class Builder:
    """A TensorRT library that is ready to build.

    Raises UsageError, MissingDependencyError, or BackendError where the library cannot start here.
    """

    def __init__(self, backend: str, compute_capabilities: Sequence[int] = ()) -> None:
        known = [name for name in BACKENDS if name == backend]
        if not known:
            raise UsageError(f"No engines are built for {backend!r}; expected {' or '.join(BACKENDS)}.")
        self.backend = known[0]
        self.needs_gpu = self.backend != RTX
        library = Library(self.backend)
        self.trt, self.version, self.logger = library.trt, library.version, library.logger
        self.capabilities = self._capabilities(compute_capabilities)
        # The constructor of classic TensorRT fails without a driver.
        self.builder = self._call(lambda: self.trt.Builder(self.logger), "cannot start")

    def build(self, directory: Path, key: str, graph: Graph, into: Path) -> Engine:
        """Build the engine of the graph that the manifest of `directory` lists under `key`, in the folder `into`.

        Raises BackendError with the parser's or builder's own message; ModelError where the graph is not as listed.
        """
        trt, backend = self.trt, self.backend
        network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        self.logger.messages.clear()
        with signals_after():
            # By path: the weights lie in a file beside it.
            parsed = parser.parse_from_file(str(directory / graph.file))
        if not parsed:
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise BackendError(f"{backend} {self.version} cannot parse {graph.file}: {_joined(errors)}")
        self._check_network(network, graph)
        config, flags = self._config()
        timings = Timings(config, self.timings_key) if self.needs_gpu else None
        plan = self._call(
            lambda: self.builder.build_serialized_network(network, config), f"cannot build {graph.file}"
        )
        if timings:
            timings.keep()
        file = into / Path(graph.file).with_suffix(f".{backend}.engine").name
        file.write_bytes(memoryview(plan))
        if not self.needs_gpu:
            self._check_plan(file, graph)
        return Engine(
            graph=key.removesuffix(f".{graph.precision}"),
            file=file.name,
            sha256=sha256_of(file),
            backend=backend,
            precision=graph.precision,
            tensorrt_version=self.version,
            compute_capability=self.capability_text,
            graph_sha256=graph.sha256,
            flags=flags,
        )

    @cached_property
    def device(self) -> Driver:
        """The GPU that classic TensorRT builds for. Raises BackendError or MissingDependencyError."""
        return open_driver()

    @property
    def timings_key(self) -> str:
        """Everything that a measured time depends on."""
        return f"{self.backend} {self.version}; {self.device.description}"

    @property
    def capability_text(self) -> str:
        """`Engine.compute_capability`: `any` for all that TensorRT-RTX knows, else numbers such as `75,86`."""
        if self.needs_gpu:
            return str(self.device.compute_capability)
        return ",".join(map(str, self.capabilities)) or "any"

    def _capabilities(self, wanted: Sequence[int]) -> tuple[int, ...]:
        if not wanted:
            return ()
        if self.needs_gpu:
            raise UsageError(
                "--compute-capability is for tensorrt_rtx; classic TensorRT builds for the GPU it runs on."
            )
        members = self.trt.ComputeCapability.__members__
        known = sorted(int(name.removeprefix("SM")) for name in members if name.startswith("SM"))
        if unknown := sorted(set(wanted) - set(known)):
            raise UsageError(
                f"--compute-capability {', '.join(map(str, unknown))}: {self.backend} {self.version} "
                f"builds for {', '.join(map(str, known))}."
            )
        return tuple(sorted(set(wanted)))

    def _config(self) -> tuple[Any, tuple[str, ...]]:
        """Return a builder configuration and `Engine.flags`."""
        trt = self.trt
        config = self.builder.create_builder_config()
        # TF32 has float16's mantissa: left on, it would undo every float32 island.
        config.clear_flag(trt.BuilderFlag.TF32)
        # Auxiliary streams would put joins into a captured graph.
        config.max_aux_streams = 0
        flags = ["no_tf32", "strongly_typed"]
        # CUDA cannot capture a run that allocates; with this TensorRT-RTX refuses to build such an engine.
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
            flags.append("user_allocation")
        if self.capabilities:
            config.num_compute_capabilities = len(self.capabilities)
            for place, capability in enumerate(self.capabilities):
                config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], place)
        return config, tuple(flags)

    def _call(self, make: Callable[[], Any], problem: str) -> Any:
        """Call the library. Raises BackendError with its messages."""
        self.logger.messages.clear()
        try:
            with signals_after():
                made = make()
        except Exception as error:  # the bindings raise several kinds without a common base
            raise BackendError(
                f"{self.backend} {self.version} {problem}: {_joined([str(error), *self.logger.messages])}"
            ) from error
        if made is None:
            raise BackendError(f"{self.backend} {self.version} {problem}: {_joined(self.logger.messages)}")
        return made

    def _check_network(self, network: Any, graph: Graph) -> None:
        """Compare the parsed network's inputs and outputs with the manifest: names, shapes, dtypes."""
        trt = self.trt
        dtypes = {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64", trt.DataType.BOOL: "bool"}
        for side, count, get, listed in (
            ("inputs", network.num_inputs, network.get_input, graph.inputs),
            ("outputs", network.num_outputs, network.get_output, graph.outputs),
        ):
            tensors = [get(i) for i in range(count)]
            got = {t.name: (dtypes.get(t.dtype, str(t.dtype)), tuple(t.shape)) for t in tensors}
            expected = {t.name: (t.dtype, t.shape) for t in listed}
            if got != expected:
                raise ModelError(
                    f"{self.backend} read the {side} of {graph.file} as {got}; "
                    f"the manifest says {expected}. Export again."
                )

    def _check_plan(self, file: Path, graph: Graph) -> None:
        """Check what a TensorRT-RTX engine's file says.

        Even TensorRT-RTX cannot deserialise or inspect an engine without a driver: it starts by opening a CUDA
        stream. The runtime compares names, shapes and dtypes when it loads the engine on its device.
        """
        try:
            header = read_rtx_header(file)
        except ModelError as error:
            raise BackendError(f"tensorrt_rtx {self.version} wrote no valid engine: {error}") from error
        if header.version != self.version:
            raise BackendError(
                f"{file.name} says TensorRT-RTX {header.version}; it was built by {self.version}."
            )
        plan = file.read_bytes()[RTX_HEADER_BYTES:]
        missing = [t.name for t in (*graph.inputs, *graph.outputs) if t.name.encode() not in plan]
        if missing:
            raise BackendError(f"{file.name} does not name {', '.join(missing)}.")


class Timings:
    """Kernel timings that classic TensorRT measured on this device, kept from one build to the next.

    They only save time: a failure here has no other effect. TensorRT refuses timings of another version or GPU. In
    TensorRT-RTX these calls do nothing since 1.2.
    """

    def __init__(self, config: Any, key: str) -> None:
        self._config, self._key = config, key
        self._stored = remembered(TIMINGS, key)
        for content in (self._stored, b""):
            with suppress(Exception):  # the bindings raise several kinds without a common base
                # An attribute, since it must outlive the build.
                self._cache = config.create_timing_cache(content)
                if config.set_timing_cache(self._cache, False):
                    return

    def keep(self) -> None:
        """Store the timings, if there are new ones."""
        with suppress(Exception):
            content = bytes(memoryview(self._config.get_timing_cache().serialize()))
            if content and content != self._stored:
                remember(TIMINGS, self._key, content)


def _joined(messages: Iterable[str]) -> str:
    distinct = dict.fromkeys(message for message in messages if message)
    return " ".join(distinct) or NO_REASON

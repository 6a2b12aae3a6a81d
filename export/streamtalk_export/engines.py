"""TensorRT engines from exported graphs: one path for classic `tensorrt` and for `tensorrt_rtx`.

Both parse the same strongly typed graphs; what differs between them is the table `FAMILIES`. TensorRT-RTX builds
without a GPU, for any of its compute capabilities; classic TensorRT builds on the GPU that will run the engine.
Nothing here needs torch, so that a Jetson can build the engines of a model that was exported elsewhere:
`python -m streamtalk_export.engines DIR --targets tensorrt`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from streamtalk.cache import cache_directory, locked, remember, remembered
from streamtalk.cuda.driver import Driver, open_driver
from streamtalk.cuda.tensorrt import error_words
from streamtalk.engine_file import RTX_HEADER_BYTES, read_rtx_header
from streamtalk.errors import ModelError, StreamTalkError
from streamtalk.interrupt import ended_by_signals, signals_after
from streamtalk.manifest import (
    FILE_NAME,
    Engine,
    Graph,
    Manifest,
    Precision,
    graph_key,
    read_manifest,
    sha256_of,
    verified,
    verified_graph,
)
from streamtalk.progress import progress
from streamtalk_export.errors import ExportError

Say = Callable[[str], None]
Target = Literal["tensorrt", "tensorrt_rtx"]

TIMINGS = "timings"
BUILDING = ".engines."
"""Beginning of the names of folders that engines are built in, beside those they replace."""
TURING = 75
DYNAMIC_SAMPLES = (3200, 32000, 960000)
"""Least, usual and most samples of a graph whose length is not fixed: the offline encoder, up to a minute."""


@dataclass(frozen=True)
class Family:
    """What differs between the two libraries."""

    target: Target
    install: str
    needs_gpu: bool
    """Whether building takes the GPU that will run the engine."""


FAMILIES: dict[str, Family] = {
    "tensorrt": Family("tensorrt", "pip install tensorrt, or on a Jetson JetPack's own packages", True),
    "tensorrt_rtx": Family("tensorrt_rtx", "pip install tensorrt-rtx", False),
}


class Builder:
    """A TensorRT library, ready to build. Raises ExportError where it is missing or cannot run here."""

    def __init__(self, target: str, compute_capabilities: Sequence[int] = ()) -> None:
        self.family = FAMILIES[target]
        try:
            self.trt: Any = importlib.import_module(target)
        except ImportError as error:
            raise ExportError(
                f"--targets {target} needs the package {target}: {self.family.install}. ({error})"
            ) from error
        self.version: str = self.trt.__version__
        self.logger: Any = error_words(self.trt)
        self.capabilities = self._capabilities(compute_capabilities)
        # The constructor of classic TensorRT fails without a driver.
        self.builder = self._made(lambda: self.trt.Builder(self.logger), "cannot start")

    def build(self, directory: Path, name: str, graph: Graph, into: Path | None = None) -> Engine:
        """Build the engine of graph `name` of `directory` there, or in the folder `into`. Raises ExportError in the
        parser's or builder's words.
        """
        trt, target = self.trt, self.family.target
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        flags = 0 if strongly_typed is None else 1 << int(strongly_typed)
        network = self.builder.create_network(flags)
        parser = trt.OnnxParser(network, self.logger)
        source = directory / graph.file
        self.logger.words.clear()
        with signals_after():
            parsed = self._parse(parser, source)
        if not parsed:
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise ExportError(f"{target} {self.version} cannot parse {graph.file}: {_joined(errors)}")
        self._check_network(network, graph)
        config = self._config(network)
        if self._capturable(graph):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        timings = Timings(config, self.timings_key) if self.family.needs_gpu else None
        plan = self._made(
            lambda: self.builder.build_serialized_network(network, config), f"cannot build {graph.file}"
        )
        if timings:
            timings.keep()
        file = (into or directory) / Path(graph.file).with_suffix(f".{target}.engine").name
        _write(file, plan)
        self._check_plan(file, graph)
        return Engine(
            graph=name.removesuffix(".fp16"),
            file=file.name,
            sha256=sha256_of(file),
            backend=target,
            precision=graph.precision,
            tensorrt_version=self.version,
            compute_capability=self.capability_text(),
            graph_sha256=graph.sha256,
            flags=("no_tf32", "strongly_typed", *(("user_allocation",) if self._capturable(graph) else ())),
        )

    def _parse(self, parser: Any, source: Path) -> bool:
        if TURING not in self.capabilities:
            return bool(parser.parse_from_file(str(source)))
        import onnx  # on a Jetson there need be none

        from streamtalk_export.half import to_convolutions

        return bool(parser.parse(to_convolutions(onnx.load(source)).SerializeToString()))

    @cached_property
    def device(self) -> Driver:
        """The GPU that classic TensorRT builds for. Raises ExportError."""
        try:
            return open_driver()
        except StreamTalkError as error:
            raise ExportError(str(error)) from error

    @property
    def timings_key(self) -> str:
        """All that a measured time depends on."""
        return f"{self.family.target} {self.version}; {self.device.description}"

    def capability_text(self) -> str:
        """What the engine's entry says: `any` for all that TensorRT-RTX knows, else numbers such as `75,86`."""
        if self.family.needs_gpu:
            return str(self.device.compute_capability)
        return ",".join(map(str, self.capabilities)) or "any"

    def _capabilities(self, wanted: Sequence[int]) -> tuple[int, ...]:
        if wanted and self.family.needs_gpu:
            raise ExportError(
                "--compute-capability is for tensorrt_rtx; classic TensorRT builds for the GPU it runs on."
            )
        # Classic TensorRT before 11 may not have the enumeration, and needs none.
        members: dict[str, Any] = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        known = sorted(int(name.removeprefix("SM")) for name in members if name.startswith("SM"))
        if unknown := sorted(set(wanted) - set(known)):
            raise ExportError(
                f"--compute-capability {', '.join(map(str, unknown))}: {self.family.target} {self.version} "
                f"builds for {', '.join(map(str, known))}."
            )
        return tuple(sorted(set(wanted)))

    def _capturable(self, graph: Graph) -> bool:
        """Whether the engine is built so that CUDA can capture it: TensorRT-RTX then refuses to build what it would
        have to allocate for as it runs. A graph of dynamic shape is not run frame by frame.
        """
        known = hasattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION")
        return known and not any(isinstance(n, str) for tensor in graph.inputs for n in tensor.shape)

    def _config(self, network: Any) -> Any:
        trt = self.trt
        config = self.builder.create_builder_config()
        # TF32 has float16's mantissa: left on, it would undo every float32 island.
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.capabilities:
            config.num_compute_capabilities = len(self.capabilities)
            for place, capability in enumerate(self.capabilities):
                config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], place)
        dynamic = [network.get_input(i) for i in range(network.num_inputs)]
        dynamic = [tensor for tensor in dynamic if -1 in tuple(tensor.shape)]
        if dynamic:
            profile = self.builder.create_optimization_profile()
            for tensor in dynamic:
                sizes = [tuple(n if d < 0 else d for d in tensor.shape) for n in DYNAMIC_SAMPLES]
                profile.set_shape(tensor.name, *sizes)
            config.add_optimization_profile(profile)
        return config

    def _made(self, make: Callable[[], Any], problem: str) -> Any:
        self.logger.words.clear()
        try:
            with signals_after():
                made = make()
        except Exception as error:  # the bindings raise several kinds without a common base
            raise ExportError(
                f"{self.family.target} {self.version} {problem}: {_joined([str(error), *self.logger.words])}"
            ) from error
        if made is None:
            raise ExportError(f"{self.family.target} {self.version} {problem}: {_joined(self.logger.words)}")
        return made

    def _check_network(self, network: Any, graph: Graph) -> None:
        """The parsed network's inputs and outputs against the manifest's: names, shapes, dtypes."""
        trt = self.trt
        kinds = {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64", trt.DataType.BOOL: "bool"}
        for what, count, get, wanted in (
            ("inputs", network.num_inputs, network.get_input, graph.inputs),
            ("outputs", network.num_outputs, network.get_output, graph.outputs),
        ):
            tensors = (get(i) for i in range(count))
            got = {t.name: (kinds.get(t.dtype, str(t.dtype)), tuple(t.shape)) for t in tensors}
            want = {
                t.name: (t.dtype, tuple(-1 if isinstance(n, str) else n for n in t.shape)) for t in wanted
            }
            if got != want:
                raise ExportError(
                    f"{self.family.target} read the {what} of {graph.file} as {got}; the manifest says {want}."
                )

    def _check_plan(self, file: Path, graph: Graph) -> None:
        """What can be told from an engine's file.

        Deserialising, and so the engine inspector, needs a driver even in TensorRT-RTX, where it starts by opening
        a CUDA stream: the runtime compares names, shapes and dtypes when it loads an engine on its device.
        """
        if self.family.needs_gpu:
            return
        try:
            header = read_rtx_header(file)
        except ModelError as error:
            raise ExportError(
                f"{self.family.target} {self.version} wrote no valid engine: {error}"
            ) from error
        if header.version != self.version:
            raise ExportError(
                f"{file.name} says TensorRT-RTX {header.version}; it was built by {self.version}."
            )
        plan = file.read_bytes()[RTX_HEADER_BYTES:]
        missing = [t.name for t in (*graph.inputs, *graph.outputs) if t.name.encode() not in plan]
        if missing:
            raise ExportError(f"{file.name} does not name {', '.join(missing)}.")


class Timings:
    """What classic TensorRT measured of its kernels on this device, kept from one build to the next.

    Only saves time: nothing that fails here fails more. TensorRT refuses what another version or GPU measured. In
    TensorRT-RTX these calls do nothing since 1.2.
    """

    def __init__(self, config: Any, key: str) -> None:
        self._config, self._key = config, key
        self._stored = remembered(TIMINGS, key)
        for content in (self._stored, b""):
            with suppress(Exception):  # the bindings raise several kinds without a common base
                # Kept here: it must outlive the build.
                self._cache = config.create_timing_cache(content)
                if config.set_timing_cache(self._cache, False):
                    return

    def keep(self) -> None:
        """Keep what was measured."""
        with suppress(Exception):
            content = bytes(memoryview(self._config.get_timing_cache().serialize()))
            if content and content != self._stored:
                remember(TIMINGS, self._key, content)


def build_engines(
    directory: Path,
    graphs: dict[str, Graph],
    precision: Precision,
    targets: Iterable[str],
    compute_capabilities: Sequence[int] = (),
    say: Say = lambda _: None,
    into: Path | None = None,
) -> tuple[Engine, ...]:
    """Engines of every graph of this precision for every target, beside the graphs or in the folder `into`. Raises
    ExportError.
    """
    engines = []
    for target in sorted(targets):
        builder = Builder(target, compute_capabilities)
        for name, graph in graphs.items():
            if graph.precision != precision:
                continue
            began = time.perf_counter()
            with progress(f"Building {graph.file} for {target}"):
                engines.append(engine := builder.build(directory, name, graph, into))
            size = ((into or directory) / engine.file).stat().st_size / 1e6
            say(f"{engine.file:40} {size:8.1f} MB  {time.perf_counter() - began:5.1f} s")
    return tuple(engines)


def _joined(words: Iterable[str]) -> str:
    distinct = dict.fromkeys(word for word in words if word)
    return " ".join(distinct) or "it gives no reason."


def _write(file: Path, plan: Any) -> None:
    """Write an engine. The folder that it is built in takes its place only when all is there."""
    try:
        file.write_bytes(memoryview(plan))
    except OSError as error:
        raise ExportError(f"Writing {file} failed: {error.strerror or error}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Add engines to an exported model; problems are one sentence on stderr and code 2."""
    p = argparse.ArgumentParser(
        prog="streamtalk_export.engines",
        description="Build the engines of an exported model on this machine.",
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="what export.py wrote")
    p.add_argument("--targets", default="tensorrt", metavar="LIST", help="tensorrt, tensorrt_rtx")
    p.add_argument("--precision", choices=("fp32", "fp16"), default="fp16")
    arguments = p.parse_args(argv)
    try:
        with ended_by_signals():
            manifest = add_engines(arguments.directory, targets_of(arguments.targets), arguments.precision)
    except KeyboardInterrupt:
        print(
            "streamtalk_export.engines: interrupted; the engines are those that were there.", file=sys.stderr
        )
        return 130
    except (ExportError, StreamTalkError) as error:
        print(f"streamtalk_export.engines: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"streamtalk_export.engines: {arguments.directory}: {error.strerror or error}.", file=sys.stderr
        )
        return 2
    print(f"{len(manifest.engines)} engines in {arguments.directory}")
    return 0


def targets_of(text: str) -> set[str]:
    """The names of a comma-separated list."""
    return {name.strip() for name in text.split(",") if name.strip()}


def only_one(directory: Path) -> AbstractContextManager[None]:
    """Keeps other processes of this user from writing the same model. Entering it raises OutputError."""
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()
    return locked(cache_directory() / "builds" / f"{name}.lock")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a model that is complete. Raises OSError."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (directory / FILE_NAME).write_bytes(encoded)


def add_engines(directory: Path, targets: Collection[str], precision: Precision) -> Manifest:
    """Build engines into an exported model: they take their places, and the manifest is replaced, when all are built.
    Raises ExportError, ModelError, OutputError and OSError.
    """
    if unknown := sorted(set(targets) - FAMILIES.keys()):
        raise ExportError(f"--targets {', '.join(unknown)} is unknown; known: {', '.join(FAMILIES)}.")
    try:
        directory = directory.resolve()
    except RuntimeError as error:  # of a loop of links, before Python 3.13
        raise ExportError(f"{directory} cannot be followed: {error}.") from error
    # Two builds of one directory would each lose the other's engines from the manifest.
    with only_one(directory):
        return _add_engines(directory, targets, precision)


def _add_engines(directory: Path, targets: Collection[str], precision: Precision) -> Manifest:
    manifest = read_manifest(directory)
    if graph_key("frame", precision) not in manifest.graphs:
        raise ExportError(
            f"{directory} has no {precision} graphs: export it with --precision {precision} first."
        )
    for graph in manifest.graphs.values():
        verified_graph(directory, graph)
    for left in directory.glob(f"{BUILDING}*"):  # by a build that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=BUILDING) as name:
        building = Path(name)
        built = build_engines(
            directory,
            manifest.graphs,
            precision,
            targets,
            say=lambda line: print(line, file=sys.stderr),
            into=building,
        )
        kept = [engine for engine in manifest.engines if _stays(directory, engine, built)]
        manifest = msgspec.structs.replace(manifest, engines=(*kept, *built))
        write_manifest(building, manifest)
        with signals_after():
            for engine in built:
                (building / engine.file).replace(directory / engine.file)
            (building / FILE_NAME).replace(directory / FILE_NAME)
    return manifest


def _stays(directory: Path, engine: Engine, built: Sequence[Engine]) -> bool:
    """Whether an engine that was there stays listed: none of its kind was built, and its file is what it was."""
    if any(
        (e.graph, e.backend, e.precision) == (engine.graph, engine.backend, engine.precision) for e in built
    ):
        return False
    try:
        verified(directory, engine.file, engine.sha256)
    except ModelError:
        return False
    return engine.file not in {new.file for new in built}


if __name__ == "__main__":
    sys.exit(main())

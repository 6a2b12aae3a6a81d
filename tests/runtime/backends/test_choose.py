"""The choice of a backend, and engines that are missing, corrupt or of another version."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from streamtalk import BackendError, MissingDependencyError, ModelError, Talker, UsageError, backends
from streamtalk.backends import onnxruntime
from streamtalk.model import Manifest, Precision, Tensor, graph_key, sha256_of
from tests.runtime.toy import Toy


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(engine, tmp_path / "engine")


def edit(directory: Path, change: Callable[[Manifest], Manifest]) -> None:
    file = directory / "manifest.json"
    file.write_bytes(msgspec.json.encode(change(msgspec.json.decode(file.read_bytes(), type=Manifest))))


def test_auto_says_what_it_took(engine: Path) -> None:
    talker = Talker.load(engine, threads=2)
    assert talker.backend == "onnxruntime-cpu"
    assert "2 threads" in talker.choice.backend.description
    # In the order of preference, each with its reason.
    assert list(talker.choice.passed_over) == ["tensorrt fp16", "tensorrt_rtx fp16", "onnxruntime-cuda fp32"]
    assert "streamtalk build" in talker.choice.passed_over["tensorrt_rtx fp16"]


class Card:
    """A backend's module: loads on the CPU what is not in `problems`, by precision; notes what it was asked for."""

    def __init__(self, problems: dict[str, Exception]) -> None:
        self.problems = problems
        self.asked: list[str] = []

    def load(self, directory: Path, manifest: Manifest, precision: Precision, threads: int) -> Any:
        self.asked.append(precision)
        if precision in self.problems:
            raise self.problems[precision]
        return onnxruntime.load(directory, manifest, "fp32", threads)


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the candidates of cards, in two precisions, before or in place of the others."""

    def put(cards: dict[str, Card], alone: bool = False, engines: bool = False) -> None:
        precisions: tuple[Precision, ...] = ("fp16", "fp32")
        for name, card in cards.items():
            monkeypatch.setitem(sys.modules, f"card_{name}", cast(ModuleType, card))
        mine = [
            backends.Candidate(name, precision, f"card_{name}", engines)
            for name in cards
            for precision in precisions
        ]
        rest = [] if alone else [c for c in backends.CANDIDATES if c.is_reference]
        monkeypatch.setattr(backends, "CANDIDATES", (*mine, *rest))

    return put


def in_both_precisions(m: Manifest) -> Manifest:
    """With float16 graphs, in name alone."""
    half = {
        graph_key("hop", "fp16"): msgspec.structs.replace(m.graphs["hop"], precision="fp16"),
    }
    return msgspec.structs.replace(m, graphs={**m.graphs, **half})


@pytest.mark.parametrize("kind", [BackendError, MissingDependencyError, ModelError])
def test_auto_passes_over_what_fails_and_says_why(
    kind: type[Exception], engine: Path, plug: Callable[..., None]
) -> None:
    plug({"card": Card({"fp32": kind("no such card")})})
    choice = Talker.load(engine).choice
    assert choice.backend.name == "onnxruntime-cpu"
    assert choice.passed_over == {"card fp32": "no such card"}
    with pytest.raises(kind, match="no such card"):
        Talker.load(engine, "card")
    plug({"card": Card({"fp32": kind("no such card")})}, alone=True)
    with pytest.raises(BackendError, match="card fp32: no such card"):
        Talker.load(engine)


@pytest.mark.parametrize("good", [0, 1])
def test_what_fails_in_one_precision_is_tried_in_the_next(
    good: int, copy: Path, plug: Callable[..., None]
) -> None:
    edit(copy, in_both_precisions)
    bad = ["fp16", "fp32"][:good]
    card = Card({precision: BackendError(f"no kernels for {precision}") for precision in bad})
    plug({"card": card})
    want = {f"card {precision}": f"no kernels for {precision}" for precision in bad}
    for name in ("card", "auto"):
        assert Talker.load(copy, name).choice.passed_over == want
    assert card.asked == ["fp16", "fp32"][: good + 1] * 2


def test_a_backend_without_engines_is_asked_once(engine: Path, plug: Callable[..., None]) -> None:
    card = Card({"fp16": BackendError("Build them.")})
    plug({"card": card}, engines=True)
    assert Talker.load(engine).choice.passed_over == {"card fp16": "Build them."}
    assert card.asked == ["fp16"]


@pytest.mark.parametrize(
    ("problems", "kind", "sentence"),
    [
        (["No kernels.", "No GPU."], BackendError, "card fp16: No kernels. card fp32: No GPU."),
        (["No GPU.", "No GPU."], BackendError, "No GPU."),  # no matter of precision
        (["No library.", "No library."], MissingDependencyError, "No library."),
    ],
)
def test_what_fails_in_every_precision_says_why(
    problems: list[str], kind: type[Exception], sentence: str, copy: Path, plug: Callable[..., None]
) -> None:
    edit(copy, in_both_precisions)
    errors = [kind(problem) for problem in problems]
    plug({"card": Card(dict(zip(("fp16", "fp32"), errors, strict=True)))})
    with pytest.raises(kind) as caught:
        Talker.load(copy, "card")
    assert sentence in str(caught.value)


def test_the_first_hop_is_timed(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = onnxruntime.load

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return load(*arguments)

    monkeypatch.setattr(onnxruntime, "load", slow)
    assert Talker.load(engine).choice.first_hop_s >= 0.2


def test_an_unknown_backend_is_told_what_there_is(engine: Path) -> None:
    with pytest.raises(UsageError, match=r"'coreml'.*auto, tensorrt, .*, onnxruntime-cpu"):
        Talker.load(engine, "coreml")


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(engine: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        Talker.load(engine, threads=threads)


def test_no_engine_at_all(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=r"export\.py"):
            Talker.load(directory)


@pytest.mark.parametrize("name", ["hop.onnx", "weights.fp32.bin", "identity.npz"])
def test_every_file_is_checked_before_it_is_used(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    for broken in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(broken)
        with pytest.raises(ModelError, match=f"{name}.*is not the file that was exported"):
            Talker.load(copy)
    file.unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        Talker.load(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1}'])
def test_a_broken_manifest(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match="export again"):
        Talker.load(copy)


def test_a_graph_that_is_no_graph(copy: Path) -> None:
    (copy / "hop.onnx").write_bytes(b"not a graph")
    digest = sha256_of(copy / "hop.onnx")

    def change(m: Manifest) -> Manifest:
        graph = msgspec.structs.replace(m.graphs["hop"], files={**m.graphs["hop"].files, "hop.onnx": digest})
        return msgspec.structs.replace(m, graphs={**m.graphs, "hop": graph})

    edit(copy, change)
    with pytest.raises(BackendError, match="cannot load"):
        Talker.load(copy, "onnxruntime-cpu")


def test_graphs_must_be_what_the_manifest_says(copy: Path, tmp_path: Path) -> None:
    other = Toy(history=6).write(tmp_path / "other")
    shutil.copy(other / "hop.onnx", copy)
    shutil.copy(other / "weights.fp32.bin", copy)

    def change(m: Manifest) -> Manifest:
        files = {name: sha256_of(copy / name) for name in m.graphs["hop"].files}
        graph = msgspec.structs.replace(m.graphs["hop"], files=files)
        return msgspec.structs.replace(m, graphs={**m.graphs, "hop": graph})

    edit(copy, change)
    with pytest.raises(
        ModelError, match=r"expected `kv_cache` as .*5, 2\], got float32 \[1, 2, 2, 2, 6, 2\]"
    ):
        Talker.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: msgspec.structs.replace(m, history=9), "`kv_cache`"),
        (lambda m: msgspec.structs.replace(m, graphs={"frame": m.graphs["hop"]}), "no graph `hop`"),
        (lambda m: msgspec.structs.replace(m, identity="../identity.npz"), "outside"),
        (lambda m: msgspec.structs.replace(m, fps=0), "fps must be positive"),
        (lambda m: msgspec.structs.replace(m, period=10**19), "period must be positive and below"),
        (lambda m: msgspec.structs.replace(m, lookahead_samples=1), "context, hop and lookahead add up to"),
        (lambda m: msgspec.structs.replace(m, schema=99), "schema 99"),
    ],
)
def test_a_manifest_that_contradicts_itself(copy: Path, change: Any, message: str) -> None:
    edit(copy, change)
    with pytest.raises(ModelError, match=message):
        Talker.load(copy)


def test_an_input_that_this_version_does_not_know(copy: Path) -> None:
    def change(m: Manifest) -> Manifest:
        graph = m.graphs["hop"]
        graph = msgspec.structs.replace(graph, inputs=(*graph.inputs, Tensor("mood", "float32", (1,))))
        return msgspec.structs.replace(m, graphs={**m.graphs, "hop": graph})

    edit(copy, change)
    with pytest.raises(ModelError, match="mood"):
        Talker.load(copy)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("styles", None, "no array `styles`"),
        ("styles", np.zeros((3, 5)), "shape"),
        ("templates", np.full((3, 4, 3), np.nan), "not finite"),
        ("speaker_names", np.array(["a", "a", "b"]), "distinct"),
        ("faces", np.array([[0, 1, 4]]), "outside the 4 vertices"),
        ("colors", np.zeros((2, 3), np.uint8), "shape"),
        ("identity_colors", np.zeros((2, 4, 3), np.uint8), "shape"),
        ("lip_pairs", np.array([[0, 4]]), "numbers of the 4 vertices"),
        ("lids", np.array([[0.5, 1]]), "numbers of the 4 vertices"),
    ],
)
def test_an_identity_must_fit(copy: Path, toy: Toy, name: str, value: Any, message: str) -> None:
    arrays: dict[str, Any] = {
        key: array for key, array in {**toy.identity, name: value}.items() if array is not None
    }
    np.savez(copy / "identity.npz", **arrays)
    edit(copy, lambda m: msgspec.structs.replace(m, identity_sha256=sha256_of(copy / "identity.npz")))
    with pytest.raises(ModelError, match=message):
        Talker.load(copy)


def test_pickles_in_an_identity_are_not_opened(copy: Path, toy: Toy) -> None:
    arrays: dict[str, Any] = {**toy.identity, "speaker_names": np.array(["a", {}, "c"], object)}
    np.savez(copy / "identity.npz", **arrays)
    edit(copy, lambda m: msgspec.structs.replace(m, identity_sha256=sha256_of(copy / "identity.npz")))
    with pytest.raises(ModelError, match="cannot be read"):
        Talker.load(copy)

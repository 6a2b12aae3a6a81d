"""The choice of a backend, and engines that are missing, corrupt or of another version."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streamtalk import BackendError, MissingDependencyError, ModelError, Talker, UsageError, backends
from streamtalk.model import Engine, Manifest, Precision, Tensor, graph_key, sha256_of
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
    assert list(talker.choice.passed_over) == ["tensorrt", "tensorrt_rtx", "onnxruntime-cuda"]
    assert "holds no tensorrt_rtx engines" in talker.choice.passed_over["tensorrt_rtx"]


def fails(*_: Any) -> Any:
    raise BackendError("no such card")


def test_auto_passes_over_what_fails_and_says_why(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "LOADERS", {"card": fails, **backends.LOADERS})
    choice = Talker.load(engine).choice
    assert choice.backend.name == "onnxruntime-cpu"
    assert choice.passed_over["card"] == "no such card"
    with pytest.raises(BackendError, match="no such card"):
        Talker.load(engine, "card")
    monkeypatch.setattr(backends, "LOADERS", {"card": fails})
    with pytest.raises(BackendError, match="card: no such card"):
        Talker.load(engine)


def test_auto_passes_over_engines_that_are_not_what_the_manifest_says(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(*_: Any) -> Any:
        raise ModelError("The inputs of frame.engine: `noise` is another")

    monkeypatch.setattr(backends, "LOADERS", {"card": foreign, **backends.LOADERS})
    choice = Talker.load(engine).choice
    assert choice.backend.name == "onnxruntime-cpu"
    assert "`noise` is another" in choice.passed_over["card"]
    with pytest.raises(ModelError, match="`noise` is another"):
        Talker.load(engine, "card")


FORMS = {"onnxruntime-cuda": ["fused", "fp16", "fp32"], "tensorrt": ["fp16", "fp32"]}


def in_all_forms(m: Manifest) -> Manifest:
    """With graphs and engines of every precision, in name alone."""
    halves: tuple[Precision, ...] = ("fused", "fp16")
    more = {
        graph_key(name, form): msgspec.structs.replace(graph, precision=form)
        for name, graph in m.graphs.items()
        for form in halves
    }
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    engines = tuple(
        Engine(
            graph="frame",
            file=f"{precision}.engine",
            sha256="0" * 64,
            backend="tensorrt",
            precision=precision,
            tensorrt_version="10.3.0",
            compute_capability="87",
            graph_sha256="0" * 64,
        )
        for precision in precisions
    )
    return msgspec.structs.replace(m, graphs={**m.graphs, **more}, engines=engines)


class Card:
    """Loads what is not in `problems`, by precision; notes what it was asked for."""

    def __init__(self, problems: dict[str, Exception]) -> None:
        self.problems, self.asked, self.load = problems, [], backends.LOADERS["onnxruntime-cpu"]  # type: ignore[var-annotated]

    def __call__(self, directory: Path, manifest: Manifest, options: Any, form: Precision) -> Any:
        self.asked.append(form)
        if form in self.problems:
            raise self.problems[form]
        return self.load(directory, manifest, options, form)


@pytest.mark.parametrize(("name", "good"), [(name, i) for name in FORMS for i in range(len(FORMS[name]))])
def test_what_fails_in_one_precision_is_tried_in_the_next(
    name: str, good: int, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, in_all_forms)
    bad = FORMS[name][:good]
    card = Card({form: BackendError(f"no kernels for {form}") for form in bad})
    monkeypatch.setattr(backends, "LOADERS", {"other": fails, name: card})
    want = {f"{name} {form}": f"no kernels for {form}" for form in bad}
    assert Talker.load(copy, name).choice.passed_over == want
    assert Talker.load(copy).choice.passed_over == {"other": "no such card"} | want
    assert card.asked == FORMS[name][: good + 1] * 2


NO_KERNELS, NO_GPU = BackendError("No kernels."), BackendError("No GPU.")
NO_LIBRARY, DAMAGED = MissingDependencyError("No library."), ModelError("frame is damaged")


@pytest.mark.parametrize(
    ("problems", "kind", "sentence", "tries"),
    [
        (
            [NO_KERNELS, NO_GPU, NO_KERNELS],
            BackendError,
            "fused: No kernels. fp16: No GPU. fp32: No kernels.",
            3,
        ),
        # No matter of precision.
        ([NO_GPU, NO_GPU], BackendError, "No GPU.", 2),
        ([NO_KERNELS, NO_GPU, NO_GPU], BackendError, "fused: No kernels. fp16: No GPU. fp32: No GPU.", 3),
        ([NO_LIBRARY], MissingDependencyError, "No library.", 1),
        ([DAMAGED], ModelError, "frame is damaged", 1),
        ([NO_KERNELS, DAMAGED], BackendError, "fused: No kernels. fp16: frame is damaged", 2),
    ],
)
def test_what_fails_in_every_precision_says_why(
    problems: list[Exception],
    kind: type[Exception],
    sentence: str,
    tries: int,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit(copy, in_all_forms)
    name = "onnxruntime-cuda"
    card = Card(dict(zip(FORMS[name], problems, strict=False)))
    monkeypatch.setattr(backends, "LOADERS", {name: card})
    with pytest.raises(kind) as caught:
        Talker.load(copy, name)
    assert str(caught.value) == sentence
    assert len(card.asked) == tries


def test_the_first_frame_is_timed(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = backends.LOADERS["onnxruntime-cpu"]

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return load(*arguments)

    monkeypatch.setattr(backends, "LOADERS", {"onnxruntime-cpu": slow})
    assert Talker.load(engine).choice.first_frame_s >= 0.2


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


@pytest.mark.parametrize("name", ["audio_encoder.onnx", "frame.onnx", "frame.onnx.data", "identity.npz"])
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
    (copy / "frame.onnx").write_bytes(b"not a graph")
    digest = sha256_of(copy / "frame.onnx")

    def change(m: Manifest) -> Manifest:
        graph = msgspec.structs.replace(
            m.graphs["frame"], files={**m.graphs["frame"].files, "frame.onnx": digest}
        )
        return msgspec.structs.replace(m, graphs={**m.graphs, "frame": graph})

    edit(copy, change)
    with pytest.raises(BackendError, match="cannot load"):
        Talker.load(copy, "onnxruntime-cpu")


def test_graphs_must_be_what_the_manifest_says(copy: Path, tmp_path: Path) -> None:
    other = Toy(history=6).write(tmp_path / "other")
    shutil.copy(other / "frame.onnx", copy)
    shutil.copy(other / "frame.onnx.data", copy)

    def change(m: Manifest) -> Manifest:
        files = {name: sha256_of(copy / name) for name in m.graphs["frame"].files}
        graph = msgspec.structs.replace(m.graphs["frame"], files=files)
        return msgspec.structs.replace(m, graphs={**m.graphs, "frame": graph})

    edit(copy, change)
    with pytest.raises(ModelError, match=r"`kv_cache` is float32 \[1, 2, 2, 2, 6, 2\]; expected .*5, 2\]"):
        Talker.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: msgspec.structs.replace(m, history=9), "`kv_cache`"),
        (
            lambda m: msgspec.structs.replace(m, graphs={"frame": m.graphs["frame"]}),
            "no graph `audio_encoder`",
        ),
        (lambda m: msgspec.structs.replace(m, identity="../identity.npz"), "outside"),
        (lambda m: msgspec.structs.replace(m, fps=0), "fps must be positive"),
        (lambda m: msgspec.structs.replace(m, period=10**19), "period must be positive and below"),
        (lambda m: msgspec.structs.replace(m, encoder_batch=2), "encoder_batch 2 is more than batch 1"),
        (lambda m: msgspec.structs.replace(m, schema=99), "schema 99"),
    ],
)
def test_a_manifest_that_contradicts_itself(copy: Path, change: Any, message: str) -> None:
    edit(copy, change)
    with pytest.raises(ModelError, match=message):
        Talker.load(copy)


def test_an_input_that_this_version_does_not_know(copy: Path) -> None:
    def change(m: Manifest) -> Manifest:
        graph = m.graphs["frame"]
        graph = msgspec.structs.replace(graph, inputs=(*graph.inputs, Tensor("mood", "float32", (1,))))
        return msgspec.structs.replace(m, graphs={**m.graphs, "frame": graph})

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

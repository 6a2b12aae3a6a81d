"""The GPU benchmark on a GPU of host memory: what it runs, and what it makes of the figures."""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import gpu, gpu_page
from benchmarks.gpu_runs import StageRun, hops, opened, steps, turns
from benchmarks.latency_rows import summary

from streamtalk import Talker
from streamtalk.backends import Choice
from streamtalk.backends.cuda.driver import open_driver
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.identity import read_identity
from streamtalk.model import read_manifest
from streamtalk.backends.probe import Limits
from tests.runtime.backends.cuda.fake import FakeEngine, fake_gpu
from tests.runtime.toy import Toy

FRAMES = 7


@pytest.fixture
def talker(tmp_path: Path) -> Any:
    """Three voices on the fake device."""
    directory = Toy(hop=2, batch=3, window_samples=2934).write(tmp_path / "engine")
    manifest = read_manifest(directory)
    identity = read_identity(directory, manifest)
    return Talker(manifest, identity, Choice(fake_gpu(directory, manifest)))


def test_turns_and_hops_are_timed_with_all_voices(talker: Any) -> None:
    calls = talker.choice.backend.driver.calls
    with opened(talker) as slots:
        calls.clear()
        assert len(list(turns(slots, talker.manifest, FRAMES))) == FRAMES
        # A hop's first turn runs twice, and its encoder once.
        hops_run = -(-FRAMES // talker.manifest.hop)
        assert calls.count("launch") == FRAMES + 2 * hops_run
        assert np.isfinite(slots.vertices()).all()
        assert len(list(hops(slots, talker.manifest, 3))) == 3


def test_a_stage_is_run_on_its_own_memory(talker: Any) -> None:
    backend = talker.choice.backend
    before = set(backend.driver.memory)
    with closing(StageRun(backend.driver, backend.frame, talker.manifest)) as run:
        backend.driver.calls.clear()
        assert run(4) > 0
        assert backend.driver.calls.count("launch") == 4
    assert set(backend.driver.memory) == before
    assert backend.frame.open_runs == 0


def test_a_stage_that_cannot_be_bound_leaves_nothing(talker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = talker.choice.backend
    before = set(backend.driver.memory), list(backend.driver.handles)

    def fails(*_: Any) -> Any:
        raise BackendError("out of memory")

    monkeypatch.setattr(backend.frame, "bind", fails)
    with pytest.raises(BackendError, match="out of memory"):
        StageRun(backend.driver, backend.frame, talker.manifest)
    assert (set(backend.driver.memory), list(backend.driver.handles)) == before


def test_a_stage_that_cannot_be_captured_runs_launch_by_launch(
    talker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = talker.choice.backend.driver

    def fails(*_: Any) -> Any:
        raise BackendError("not permitted when stream is capturing")

    monkeypatch.setattr(type(driver), "capture", fails)
    with closing(StageRun(driver, talker.choice.backend.frame, talker.manifest)) as run:
        driver.calls.clear()
        assert run(3) > 0
    assert (driver.calls.count("enqueue"), driver.calls.count("launch")) == (3, 0)


@pytest.mark.parametrize("staggered", [False, True])
def test_steps_are_timed_where_every_voice_has_a_frame(talker: Any, staggered: bool) -> None:
    pcm = np.zeros(16000, np.float32)
    whole = (len(pcm) - talker.manifest.window_samples) * talker.fps // 16000
    assert whole - 6 <= len(list(steps(talker, pcm, staggered))) <= len(pcm) * talker.fps // 16000


def test_targets_are_read_off_the_rows() -> None:
    rows = [
        summary("vocaset", "tensorrt_rtx", "", 0.0, "frame", [0.25e-3, 0.25e-3, 0.25e-3], fps=30),
        summary("vocaset", "released-streaming", "frame-0", 0.0, "frame", [6e-3], fps=30),
        summary("vocaset", "tensorrt_rtx", "", 0.0, "audio_encoder", [0.8e-3]),
        summary("vocaset", "tensorrt_rtx", "batch-32-step-staggered", 0.0, "total", [1 / 31], fps=30),
        summary("vocaset", "tensorrt_rtx", "batch-128-step-staggered", 0.0, "total", [1 / 29], fps=30),
        summary("vocaset", "tensorrt_rtx", "batch-512-step", 0.0, "total", [1 / 31], fps=30),
        summary("biwi", "tensorrt_rtx", "", 0.0, "frame", [9.0], fps=25),
    ]
    # A faster host gave these to another backend: each is held against what took turns with it.
    rows += [
        summary("vocaset", "onnxruntime-cuda", "", 0.0, "frame", [0.25e-3], fps=30),
        summary("vocaset", "released-streaming", "frame-0", 0.0, "frame", [3e-3], fps=30),
    ]
    times = [t.measured for t in gpu.targets(rows) if "times faster" in t.name]
    assert times == pytest.approx([24, 12])
    rows = rows[:-2]
    found = {target.name.partition(": ")[2]: target for target in gpu.targets(rows)}
    assert found["frame p50"].met and found["frame p99"].met
    assert not found["audio encoder p50"].met
    assert found["times faster than the released first frame"].measured == pytest.approx(24)
    assert found["voices at hop 4 without a late step"].measured == 32
    assert {asdict(target)["bound"] for target in found.values()} == set(gpu.TARGETS.values())


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        open_driver()
    except (BackendError, MissingDependencyError) as error:
        assert gpu.main(["--no-eager"]) == 2
        assert str(error) in capsys.readouterr().err
    else:
        pytest.skip("this machine has a GPU")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for a GPU with one backend, and for the release's algorithm; the folder of the models."""
    for name, batch in (("batch-1", 1), ("batch-3", 3), ("no-fold", 1)):
        Toy(hop=2, batch=batch, window_samples=2934).write(tmp_path / f"vocaset-{name}")

    def load(folder: Path, name: str, download: bool = True) -> Talker:
        if name != "tensorrt":
            raise BackendError(f"no {name} here")
        manifest = read_manifest(folder)
        backend = replace(fake_gpu(folder, manifest), name=name, download=download)
        return Talker(manifest, read_identity(folder, manifest), Choice(backend, first_frame_s=0.5))

    class Eager:
        def __init__(self, preset: str) -> None:
            assert preset == "vocaset"

        def frame(self, i: int) -> dict[str, float]:
            return dict.fromkeys(("condition_predictor", "diffusion_head", "vq_decoder"), 0.01 * (i + 1))

        def encoder(self, audio_s: float) -> float:
            return 0.001 * audio_s

    def engine(folder: Path, backend: Any, name: str) -> FakeEngine:
        return FakeEngine(folder, backend.manifest.graphs[name], backend.driver, True)

    probe = SimpleNamespace(limits={"fp32": Limits(0.2, 0.4)})
    for name, value in {
        "Talker": SimpleNamespace(load=load),
        "Eager": Eager,
        "CudaBackend": object,
        "open_driver": lambda: SimpleNamespace(description="a fake GPU"),
        "read_probe": lambda *_: probe,
        "measure": lambda *_: (0.1, 0.1),
        "stage_engine": engine,
        "profiled": lambda run: (run(), {"cudaGraphLaunch": 1, "on the device: kernels": 5})[1],
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tmp_path


def test_everything_is_measured_and_what_is_missing_is_said(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"
    timed_before_profiled: list[int] = []

    def profiled(run: Any) -> dict[str, int]:
        timed_before_profiled.append(len(json.loads(file.read_text())["rows"]))
        run()
        return {"cudaGraphLaunch": 1}

    monkeypatch.setattr(gpu, "profiled", profiled)
    arguments = ["--models", str(machine), "--batches", "1", "3", "5", "--frames", "24", "--minutes", "0.02"]
    assert gpu.main([*arguments, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    rows = {(r["system"], r["variant"], r["stage"]) for r in document["rows"]}
    ours = [v for system, v, stage in rows if system == "tensorrt" and stage == "frame"]
    assert set(ours) == {"", "hop-start", "resident", "no-fold", "batch-3", "batch-3-hop-start"}
    assert {("tensorrt", "", "total"), ("tensorrt", "batch-3-step-staggered", "total")} <= rows
    assert {("tensorrt", "", "audio_encoder"), ("released-streaming", "frame-0", "frame")} <= rows
    assert document["skipped"]["vocaset, batch 5"] == "there is no such export"
    assert "no onnxruntime-cuda here" in document["skipped"]["onnxruntime-cuda, vocaset, batch 3"]
    assert document["parity"][0]["p99"] == 0.1
    assert [item["of"] for item in document["launches"]] == ["a hop's first frame", "a frame"]
    assert timed_before_profiled == [len(document["rows"])] * 2
    assert document["settings"]["vocaset"]["hop"] == 2
    assert "skipped vocaset, batch 5" in capsys.readouterr().out


def test_a_batch_that_fails_midway_does_not_end_the_run(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise BackendError("no room")

    monkeypatch.setattr(gpu, "many_voices", fail)
    file = tmp_path / "gpu.json"
    arguments = ["--models", str(machine), "--batches", "3", "1", "--frames", "24", "--minutes", "0"]
    assert gpu.main([*arguments, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["skipped"]["tensorrt, vocaset, batch 3, midway"] == "no room"
    assert any(row["system"] == "tensorrt" for row in document["rows"])


def test_late_is_a_frame_that_comes_late(monkeypatch: pytest.MonkeyPatch, talker: Any) -> None:
    """Not one whose hop was slow on average: the encoder's run counts where it falls."""
    monkeypatch.setattr(gpu, "frame_times", lambda *_: np.array([0.06, 0.001] * 30))
    result = gpu.Result()
    gpu.long_stream("vocaset", talker, 1 / 30, result)
    (row,) = result.rows
    assert (row.late, row.frames, row.max_ms) == (30, 60, 60.0)
    assert row.p50_ms == row.p99_ms == 30.5


def test_what_failed_is_let_go_before_another_loads(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it refers to itself, as an error does that keeps its own frame."""
    stand_ins: Any = gpu
    load, failed, alive = stand_ins.Talker.load, list[Any](), list[int]()

    def counted(folder: Path, name: str, **options: Any) -> Any:
        alive.append(sum(error() is not None for error in failed))
        if name != "tensorrt":
            error = BackendError("no memory")
            failed.append(weakref.ref(error))
            raise error
        return load(folder, name, **options)

    monkeypatch.setattr(gpu, "Talker", SimpleNamespace(load=counted))
    gc.disable()
    try:
        backends = ["onnxruntime-cuda", "tensorrt"]
        list(gpu.loaded(machine / "vocaset-batch-3", backends, "vocaset, batch 3", gpu.Result()))
    finally:
        gc.enable()
    assert (len(failed), alive) == (1, [0, 0])


def test_a_model_is_let_go_before_another_loads(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes as much of the GPU's memory again; the collector is off while the benchmark runs."""
    stand_ins: Any = gpu
    load, made, alive = stand_ins.Talker.load, list[Any](), list[int]()

    def counted(folder: Path, name: str, **options: Any) -> Any:
        alive.append(sum(talker() is not None for talker in made))
        talker = load(folder, name, **options)
        made.append(weakref.ref(talker))
        return talker

    monkeypatch.setattr(gpu, "Talker", SimpleNamespace(load=counted))
    assert gpu.main(["--models", str(machine), "--batches", "3", "3", "--frames", "24", "--no-eager"]) == 0
    assert len(made) == 3  # twice the batch, once without a fold
    assert not any(alive)


@pytest.mark.parametrize("arguments", [["--frames", "5"], ["--presets", "bundled"]])
def test_arguments_that_cannot_be_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(arguments)
    assert refused.value.code == 2


def test_without_torchs_cuda_the_baseline_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--no-eager" in capsys.readouterr().err


def test_the_page_of_a_result() -> None:
    def row(
        variant: str, stage: str, n: int, system: str = "tensorrt", audio_s: float = 0.0
    ) -> dict[str, Any]:
        return asdict(summary("vocaset", system, variant, audio_s, stage, [2e-3] * n, fps=30))

    document = {
        "gpu": "a fake GPU",
        "versions": {"torch": "2.11.0"},
        "settings": {"vocaset": {}},
        "parity": [
            {"model": "vocaset, batch 1", "backend": "tensorrt"}
            | {"p99": 1.0, "max": 1.0, "allowed_p99": 2.0, "allowed_max": 10.0}
        ],
        "launches": [
            {"model": "vocaset", "backend": "tensorrt", "of": "a frame"}
            | {"calls": {"cudaGraphLaunch": 1, "on the device: Memcpy HtoD ": 9, "on the device: kernels": 5}}
        ],
        "rows": [
            row("", "frame", 100),
            row("", "total", 60, audio_s=120.0),
            row("frame-0", "frame", 6, "released-streaming"),
            row("batch-8", "frame", 5),
            row("batch-8-step", "total", 5),
            row("windows-2", "audio_encoder", 5),
        ],
        "targets": [],
    }
    page = gpu_page.section([document])
    for line in (
        "| one voice | vocaset, `tensorrt` |",
        "| a frame | 2.00 (2.00) |",
        "| a frame of a stream, encoder amortised | 2.00; 2 min of audio: 0 of 60 late |",
        "| eager PyTorch, first frame | 2.00 |",
        "| its first frame against ours | 1.0 times |",
        "| a frame's graph launches; copies and kernels on the device | 1; 9, 5 |",
        "| the probe's error, of what is allowed | 50 % and 10 % |",
        "| vocaset | 8 | 2.00 | 2.00, 0 of 5 late |  |",
        "| vocaset | 2 | 2.00 |",
    ):
        assert line in page.splitlines()

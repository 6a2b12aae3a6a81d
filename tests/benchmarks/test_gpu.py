"""The GPU benchmark on a GPU of host memory: what it runs, and what it makes of the figures."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import gpu, gpu_page
from benchmarks.gpu_runs import IN_FLIGHT, hops, opened, queued, steps
from benchmarks.latency_rows import summary

from streamtalk import Talker
from streamtalk.backends import Choice
from streamtalk.backends.cuda.driver import open_driver
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.identity import read_identity
from streamtalk.model import read_manifest
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.cuda.libraries import load_gpu
from tests.runtime.backends.probes import add_probe
from tests.runtime.toy import Toy

HOPS = 7
TOY = Toy(rows=(1, 3))


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    return FakeCuda()


def on_fake_gpu(directory: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Talker:
    backend = load_gpu(cuda, directory, monkeypatch)
    manifest = read_manifest(directory)
    return Talker(manifest, read_identity(directory, manifest), Choice(backend, first_hop_s=0.5))


@pytest.fixture
def talker(tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Talker:
    directory = TOY.write(tmp_path / "engine")
    add_probe(directory, TOY)
    return on_fake_gpu(directory, cuda, monkeypatch)


@pytest.mark.parametrize("rows", [1, 3])
def test_hops_are_timed_one_launch_each(rows: int, talker: Talker, cuda: FakeCuda) -> None:
    with opened(talker, rows) as (group, every):
        cuda.calls.clear()
        assert len(list(hops(group, every, HOPS))) == HOPS
        assert cuda.count_calls("cudaGraphLaunch") == {"cudaGraphLaunch": HOPS}
        assert np.isfinite(group.vertices()).all()
        assert group.frames.tolist() == [HOPS * TOY.hop] * rows
        assert len(list(queued(group, every, 2))) == 2
        assert group.frames.tolist() == [(HOPS + 2 * IN_FLIGHT) * TOY.hop] * rows


@pytest.mark.parametrize(("streams", "ticks_each"), [(3, TOY.hop), (3 * TOY.hop, 1)])
def test_steps_are_timed_where_a_group_is_launched(streams: int, ticks_each: int, talker: Talker) -> None:
    """One group has its hop due on every tick of its phase; as many as a hop has frames take turns."""
    seconds = 1
    found = len(list(steps(talker, streams, np.zeros(16000 * seconds, np.float32))))
    assert found == pytest.approx(talker.fps * (seconds - talker.delay_s) / ticks_each, abs=3)


def test_targets_are_read_off_the_rows() -> None:
    rows = [
        summary("vocaset", "tensorrt_rtx", "", 0.0, "hop", [1.6e-3] * 3),
        summary("vocaset", "tensorrt_rtx", "", 0.0, "total", [0.4e-3] * 3, fps=30),
        summary("vocaset", "released-streaming", "frame-0", 0.0, "frame", [6e-3], fps=30),
        summary("vocaset", "tensorrt_rtx", "", 600.0, "total", [9.0], fps=30),
        summary("vocaset", "tensorrt_rtx", "batch-32-step", 0.0, "total", [1 / 31], fps=30),
        summary("vocaset", "tensorrt_rtx", "batch-128-step", 0.0, "total", [1 / 29], fps=30),
        summary("vocaset", "tensorrt_rtx", "batch-512", 0.0, "total", [1 / 31], fps=30),
        summary("biwi", "tensorrt_rtx", "", 0.0, "hop", [9.0]),
    ]
    # A faster host gave these to another backend: each is held against the frames that took turns with it.
    others = [
        summary("vocaset", "onnxruntime-cuda", "", 0.0, "total", [0.4e-3], fps=30),
        summary("vocaset", "released-streaming", "frame-0", 0.0, "frame", [3e-3], fps=30),
    ]
    times = [t.measured for t in gpu.targets([*rows, *others]) if "times faster" in t.name]
    assert times == pytest.approx([15, 7.5])
    found = {target.name.partition(": ")[2]: target for target in gpu.targets(rows)}
    assert found["hop p50"].met and found["hop p99"].met
    assert found["times faster than the released first frame"].measured == pytest.approx(15)
    assert found["streams without a late step"].measured == 32
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
def machine(tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for a GPU with one backend, and for the released algorithm; the folder of the models."""
    for name, toy in (("rows", TOY), ("no-fold", Toy())):
        add_probe(toy.write(tmp_path / f"vocaset-{name}"), toy)

    def load(folder: Path, name: str) -> Talker:
        if name != "tensorrt":
            raise BackendError(f"no {name} here")
        return on_fake_gpu(folder, cuda, monkeypatch)

    class Eager:
        def __init__(self, preset: str) -> None:
            assert preset == "vocaset"

        def frame(self, i: int) -> dict[str, float]:
            return dict.fromkeys(("condition_predictor", "diffusion_head", "vq_decoder"), 0.01 * (i + 1))

    for name, value in {
        "Talker": SimpleNamespace(load=load),
        "Eager": Eager,
        "open_driver": lambda: SimpleNamespace(description="a fake GPU"),
        "profiled": lambda run: (run(), {"cudaGraphLaunch": 1, "on the device: kernels": 5})[1],
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tmp_path


def test_everything_is_measured_and_what_is_missing_is_reported(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"
    timed_before_profiled: list[int] = []

    def profiled(run: Any) -> dict[str, int]:
        timed_before_profiled.append(len(json.loads(file.read_text())["rows"]))
        run()
        return {"cudaGraphLaunch": 1}

    monkeypatch.setattr(gpu, "profiled", profiled)
    arguments = [
        "--models",
        str(machine),
        "--presets",
        "vocaset",
        "biwi",
        "--frames",
        "24",
        "--minutes",
        "0.02",
    ]
    monkeypatch.setattr(gpu, "Eager", lambda _, make=gpu.Eager: make("vocaset"))
    assert gpu.main([*arguments, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    rows = {(r["system"], r["variant"], r["stage"]) for r in document["rows"]}
    ours = {variant for system, variant, stage in rows if (system, stage) == ("tensorrt", "hop")}
    assert ours == {"", "back-to-back", "resident", "no-fold", "batch-3"}
    assert {variant for _, variant, _ in rows if "step" in variant} == {"batch-3-step", "batch-6-step"}
    assert ("released-streaming", "frame-0", "frame") in rows
    assert {row["audio_s"] for row in document["rows"]} == {0.0, 1.2}
    assert document["skipped"]["biwi"] == "there is no such export"
    assert "no onnxruntime-cuda here" in document["skipped"]["onnxruntime-cuda, vocaset"]
    assert [item["model"] for item in document["parity"]] == ["vocaset, batch 1", "vocaset, batch 3"]
    assert all(item["max"] <= item["allowed_max"] for item in document["parity"])
    assert [item["of"] for item in document["launches"]] == ["a hop"]
    assert timed_before_profiled == [len(document["rows"])]
    assert document["settings"]["vocaset"]["hop"] == TOY.hop
    assert "skipped biwi" in capsys.readouterr().out
    assert "| a hop |" in gpu_page.section([document])


def test_rows_that_fail_do_not_end_the_run(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise BackendError("no room")

    monkeypatch.setattr(gpu, "many_streams", fail)
    file = tmp_path / "gpu.json"
    arguments = ["--models", str(machine), "--frames", "24", "--minutes", "0"]
    assert gpu.main([*arguments, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["skipped"]["tensorrt, vocaset, 3 rows"] == "no room"
    assert any(row["system"] == "tensorrt" for row in document["rows"])


def test_a_late_hop_makes_all_its_frames_late(monkeypatch: pytest.MonkeyPatch, talker: Talker) -> None:
    monkeypatch.setattr(gpu, "hop_times", lambda *_: np.array([0.08, 0.001, 0.06]))
    result = gpu.Result()
    gpu.long_stream("vocaset", talker, 1 / 30, result)
    hop, frame = result.rows
    assert (frame.late, frame.frames, hop.max_ms) == (2, 6, 80.0)  # 60 ms are within the time of two frames
    assert (hop.p50_ms, frame.p50_ms, frame.first_frame_ms) == (60.0, 30.0, 80.0)


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
        list(gpu.loaded(machine / "vocaset-rows", backends, "vocaset", gpu.Result()))
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
    assert gpu.main(["--models", str(machine), "--frames", "24", "--minutes", "0", "--no-eager"]) == 0
    assert len(made) == 3  # with rows, without a fold, and for its launches
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

    document: dict[str, Any] = {
        "gpu": "a fake GPU",
        "versions": {"torch": "2.11.0"},
        "settings": {"vocaset": {}},
        "parity": [
            {"model": "vocaset, batch 1", "backend": "tensorrt"}
            | {"p99": 1.0, "max": 1.0, "allowed_p99": 2.0, "allowed_max": 10.0}
        ],
        "launches": [
            {"model": "vocaset", "backend": "tensorrt", "of": "a hop"}
            | {"calls": {"cudaGraphLaunch": 1, "on the device: Memcpy HtoD ": 9, "on the device: kernels": 5}}
        ],
        "rows": [
            row("", "hop", 100),
            row("", "total", 100),
            row("", "total", 60, audio_s=120.0),
            row("frame-0", "frame", 6, "released-streaming"),
            row("batch-8", "hop", 5),
            row("batch-8-step", "total", 5),
            row("batch-32-step", "total", 5),
        ],
        "targets": [],
    }
    page = gpu_page.section([document]).splitlines()
    for line in (
        "| one stream | vocaset, `tensorrt` |",
        "| a hop | 2.00 (2.00) |",
        "| a frame's share of it | 2.00 (2.00) |",
        "| a frame of a stream, its hop's share | 2.00; 2 min of audio: 0 of 60 late |",
        "| eager PyTorch, first frame | 2.00 |",
        "| its first frame against ours | 1.0 times |",
        "| a hop's graph launches; copies and kernels on the device | 1; 9, 5 |",
        "| the probe's error, of what is allowed | 50 % and 10 % |",
        "| many streams | rows | a hop of all | a step |",
        "| vocaset | 8 | 2.00 | 2.00, 0 of 5 late |",
        "| vocaset | 32 |  | 2.00, 0 of 5 late |",
    ):
        assert line in page
    assert not any("frame that stays" in line or "audio encoder" in line for line in page)
    # Results from before a hop was one launch.
    document["rows"] = [row("", "frame", 100), row("windows-2", "audio_encoder", 5)]
    page = gpu_page.section([document]).splitlines()
    assert "| a frame | 2.00 (2.00) |" in page
    assert "| vocaset | 2 | 2.00 |" in page

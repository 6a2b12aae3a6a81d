"""`streamtalk doctor`: every finding says what to do, and nothing foreign can take the report down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamtalk.app import doctor
from streamtalk.app.cli import main
from streamtalk.app.doctor import Finding, Machine, as_text, examine, jetson_release, on_pci, verdict
from streamtalk.app.installed import Answer, Found, ask, gpus

TIMEOUT_S = 60.0
ABSENT = Answer("absent", "not installed")
ORIN: Found = {"cuda": "12.6", "gpus": [{"name": "Orin", "compute_capability": "8.7", "memory_gib": 29.9}]}
RTX: Found = {
    "cuda": "13.0",
    "gpus": [{"name": "RTX 5090", "compute_capability": "12.0", "memory_gib": 31.8}],
}
CPU_ONLY: Found = {
    "version": "1.23.2",
    "providers": ["CPUExecutionProvider"],
    "packages": ["onnxruntime 1.23.2"],
}
Fake = Callable[..., dict[str, Finding]]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, engine: Path) -> Fake:
    """Examine a machine that gives these answers; a probe that none is given for is absent. Findings by name."""

    def fake(
        answers: dict[str, Answer],
        *,
        driver: str = "",
        jetson: str = "",
        pci: bool = False,
        model: Path = engine,
    ) -> dict[str, Finding]:
        def answer(name: str, *arguments: str, timeout_s: float) -> Answer:
            assert timeout_s > 0
            return answers.get(arguments[0] if name == "tensorrt" else name, ABSENT)

        monkeypatch.setattr(doctor, "ask", answer)
        monkeypatch.setattr(doctor, "driver_version", lambda: driver)
        monkeypatch.setattr(doctor, "jetson_release", lambda: jetson)
        monkeypatch.setattr(doctor, "on_pci", lambda: pci)
        return {finding.name.strip(): finding for finding in examine(model)}

    return fake


def stub(directory: Path, module: str, code: str) -> None:
    (directory / f"{module}.py").write_text(code)


def test_without_anything_optional(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "cuda", "onnxruntime"):
        stub(tmp_path, name, f"raise ModuleNotFoundError('no', name={name!r})")
    stub(tmp_path, "sounddevice", "raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor", "--engine", str(engine)]) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert "-> sudo apt install libportaudio2" in out
    assert "onnxruntime-cpu needs the package onnxruntime" in " ".join(out.split())
    assert out.splitlines()[-1].startswith(f"No backend can run {engine} here.")
    assert "pip install 'streamtalk[" in out.splitlines()[-1]


def test_json_of_a_model_that_runs(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--engine", str(engine), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] is True
    assert "onnxruntime-cpu" in report["verdict"]
    findings = {finding["name"].strip(): finding for finding in report["findings"]}
    assert findings["onnxruntime"]["details"]["providers"]
    assert findings["Python"]["details"]["cpu_cores"] >= 1
    loaded = findings["onnxruntime-cpu"]
    assert loaded["state"] == "ok"
    assert loaded["backend"] == "onnxruntime-cpu"
    assert loaded["details"]["load_s"] > 0


def test_a_damaged_model_is_named(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], examined: Fake
) -> None:
    broken = shutil.copytree(engine, tmp_path / "broken")
    graph = broken / "hop.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    (broken / "blendshapes.npz").unlink()
    reason = ask("load", str(broken), "onnxruntime-cpu", timeout_s=TIMEOUT_S).reason
    findings = examined({"load": Answer("broken", reason)}, model=broken)
    model = findings["model"]
    assert model.state == "broken"
    assert f"{graph} is not the file that was exported" in model.text
    assert f"{broken / 'blendshapes.npz'} is missing" in model.text
    assert "identity" not in model.text
    assert str(broken) in findings["onnxruntime-cpu"].text
    runs, sentence = verdict(broken, list(findings.values()))
    assert not runs
    assert "hop.onnx" in sentence

    for content in (None, b"{", b"\xff\xfe"):
        directory = tmp_path / "none"
        if content is not None:
            directory.mkdir(exist_ok=True)
            (directory / "manifest.json").write_bytes(content)
        assert main(["doctor", "--engine", str(directory)]) == 2
        assert str(directory) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "crashed with SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "crashed with SIGSEGV"),
        ("import os; os._exit(3)", "ended with code 3"),
        ("raise ImportError('libnvinfer.so.10: cannot open')", "ImportError: libnvinfer.so.10: cannot open"),
        ("import a_part_that_is_gone", "ModuleNotFoundError: No module named 'a_part_that_is_gone'"),
        ("raise SystemExit('no')", "ended with code 1: no"),
    ],
)
def test_a_library_that_breaks_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    stub(tmp_path, "tensorrt", code)
    monkeypatch.syspath_prepend(tmp_path)
    answer = ask("tensorrt", "tensorrt", timeout_s=TIMEOUT_S)
    assert answer.state == "broken"
    assert reason in answer.reason


def test_a_library_that_hangs_or_chatters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "tensorrt", "import time; time.sleep(600)")
    stub(
        tmp_path,
        "tensorrt_rtx",
        "import atexit, os; print('{}', flush=True); os.system('echo loud'); "
        "atexit.register(os.abort); __version__ = '1.7'",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ask("tensorrt", "tensorrt", timeout_s=2) == Answer("broken", "no answer within 2 s")
    answer = ask("tensorrt", "tensorrt_rtx", timeout_s=TIMEOUT_S)
    assert answer == Answer("ok", found={"version": "1.7", "path": str(tmp_path)})


def test_no_gpu_asks_for_nothing_but_the_cpu_backend(examined: Fake) -> None:
    findings = examined({})
    assert {name for name, finding in findings.items() if finding.todo} == {"onnxruntime", "audio"}
    assert findings["onnxruntime"].todo == "pip install 'streamtalk[cpu]'"
    assert findings["NVIDIA GPU"].state == findings["TensorRT"].state == "absent"


def test_an_rtx_card(engine: Path, examined: Fake) -> None:
    findings = examined({"cuda": Answer("ok", found=RTX)}, driver="580.65.06")
    assert findings["NVIDIA GPU"].text == "RTX 5090, compute capability 12.0, 31.8 GiB"
    assert findings["driver"].text == "580.65.06, CUDA 13.0"
    assert findings["TensorRT"].todo == "pip install 'streamtalk[tensorrt]'"
    assert findings["TensorRT-RTX"].todo == "pip install 'streamtalk[rtx]'"
    assert findings["cuda-bindings"].todo == "pip install 'streamtalk[cuda]' 'cuda-bindings<14'"
    assert findings["onnxruntime"].todo == "pip install 'streamtalk[gpu]'"
    assert f"streamtalk build {engine} --backend tensorrt_rtx" in findings["model"].todo


def test_a_jetson_takes_the_systems_tensorrt(engine: Path, examined: Fake) -> None:
    findings = examined({"cuda": Answer("ok", found=ORIN)}, jetson="R36.4.7", driver="540.4.0")
    assert findings["driver"].text == "Jetson Linux R36.4.7, 540.4.0, CUDA 12.6"
    assert "--system-site-packages" in findings["TensorRT"].todo
    assert findings["TensorRT-RTX"].todo == ""
    assert findings["cuda-bindings"].todo == "pip install 'streamtalk[cuda]' 'cuda-bindings<13'"
    assert findings["onnxruntime"].todo == "pip install 'streamtalk[cpu]'"
    assert "power mode" in findings
    assert f"streamtalk build {engine} --backend tensorrt" in findings["model"].todo
    assert not any("streamtalk[tensorrt]" in f.todo or "streamtalk[gpu]" in f.todo for f in findings.values())


def test_both_onnxruntimes_are_never_right(examined: Fake) -> None:
    both = {**CPU_ONLY, "packages": ["onnxruntime 1.23.2", "onnxruntime-gpu 1.23.2"]}
    finding = examined({"onnxruntime": Answer("ok", found=both)})["onnxruntime"]
    assert finding.state == "broken"
    assert "overwrite each other" in finding.text
    remove, _, install = finding.todo.partition(" && ")
    assert remove == "pip uninstall -y onnxruntime onnxruntime-gpu"
    assert install == "pip install 'streamtalk[cpu]'"


def test_the_cpu_build_on_a_gpu_is_replaced_not_joined(examined: Fake) -> None:
    answers = {"cuda": Answer("ok", found=RTX), "onnxruntime": Answer("ok", found=CPU_ONLY)}
    finding = examined(answers, driver="580.65.06")["onnxruntime"]
    assert finding.state == "ok"
    assert finding.todo.endswith("uninstall -y onnxruntime onnxruntime-gpu && pip install 'streamtalk[gpu]'")


def test_bindings_newer_than_the_driver(examined: Fake) -> None:
    answers = {
        "cuda": Answer("ok", found=ORIN),
        "cuda-bindings": Answer("ok", found={"version": "13.4.4", "error": ""}),
    }
    finding = examined(answers, jetson="R36.4.7")["cuda-bindings"]
    assert finding.state == "broken"
    assert "'cuda-bindings<13'" in finding.todo


@pytest.mark.parametrize(
    ("cuda", "options", "todo"),
    [
        (Answer("absent", "libcuda.so.1 is not here"), {"driver": "580.65.06"}, "--gpus all"),
        (Answer("absent", "libcuda.so.1 is not here"), {"pci": True}, "ubuntu-drivers install"),
        (Answer("broken", "cuInit gave CUDA error 803"), {}, "reboot"),
    ],
)
def test_a_gpu_that_cannot_be_used(examined: Fake, cuda: Answer, options: dict[str, Any], todo: str) -> None:
    finding = examined({"cuda": cuda}, **options)["NVIDIA GPU"]
    assert finding.state == "broken"
    assert cuda.reason in finding.text
    assert todo in finding.todo


class FakeCuda:
    """libcuda with one device: writes through the pointers that it is given."""

    def __init__(self, init: int = 0) -> None:
        self.cuInit = lambda _flags: init

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(pointer: Any, *arguments: Any) -> int:
            if name == "cuDeviceGetName":
                pointer.value = b"Orin"
            elif name == "cuDeviceGetAttribute":
                pointer._obj.value = {75: 8, 76: 7}[arguments[0]]
            else:
                values = {"cuDriverGetVersion": 12060, "cuDeviceGetCount": 1, "cuDeviceGet": 0}
                pointer._obj.value = {**values, "cuDeviceTotalMem_v2": 8 << 30}[name]
            return 0

        return call


def test_the_drivers_library_is_read() -> None:
    card = {"name": "Orin", "compute_capability": "8.7", "memory_gib": 8.0}
    assert gpus(FakeCuda()) == {"cuda": "12.6", "gpus": [card]}
    assert gpus(FakeCuda(init=100)) == {"cuda": "12.6", "gpus": []}
    with pytest.raises(RuntimeError, match="803"):
        gpus(FakeCuda(init=803))


def test_files_of_the_system(tmp_path: Path) -> None:
    file = tmp_path / "nv_tegra_release"
    assert jetson_release(file) == ""
    file.write_text("# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64\n")
    assert jetson_release(file) == "R36.4.7"
    assert not on_pci(tmp_path / "none")
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300")):
        (tmp_path / "bus" / name).mkdir(parents=True)
        (tmp_path / "bus" / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / "bus" / name / "class").write_text(f"{kind}\n")
    assert not on_pci(tmp_path / "bus")
    (tmp_path / "bus" / "b" / "class").write_text("0x030200\n")
    assert on_pci(tmp_path / "bus")


def test_text_is_aligned_and_commands_stay_whole() -> None:
    command = (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'streamtalk[gpu]' 'cuda-bindings<13' "
        * 2
    )
    lines = as_text(Finding("cuda-bindings", "broken", "some words " * 30, command)).splitlines()
    assert lines[0].startswith("!!  cuda-bindings  ")
    column = lines[0].index("some")
    assert len(lines) > 3
    assert all(line[:column].isspace() for line in lines[1:])
    assert lines[-1] == " " * column + "-> " + command
    assert max(map(len, lines[:-1])) <= 120


def test_no_driver_no_bound() -> None:
    assert Machine(gpu=True, cuda_major=0, driver="", jetson="").bindings == "pip install 'streamtalk[cuda]'"

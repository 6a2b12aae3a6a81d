"""`streamtalk doctor`: what is here, what a model runs on, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import streamtalk
from streamtalk.app.installed import Answer, Found, State, ask
from streamtalk.app.progress import progress
from streamtalk.backends import available
from streamtalk.backends.cuda.driver import BUILD, driver_build
from streamtalk.backends.engine_file import how_to_build
from streamtalk.errors import ModelError
from streamtalk.model import Manifest, read_manifest, verified

PROBE_S = 60.0
"""Time for a library to import; far above the slowest seen, because a cold disk may be slow."""
LOAD_S = 900.0
"""Time for a model to load: a backend may build and try an engine on its first start."""
NVIDIA_PCI = "0x10de"
DISPLAY_CLASS = "0x03"
NAME_WIDTH = 19


@dataclass(frozen=True)
class Finding:
    """One line of the report. `todo` says what to do and is empty where nothing is needed; `backend` is set
    where the line says whether the model loads on one.
    """

    name: str
    state: State
    text: str
    todo: str = ""
    backend: str = ""
    details: Found = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What decides which packages are the right ones here. `gpu`: there is an NVIDIA GPU, whether or not its
    driver works; `cuda_major` is the driver's, 0 without one; `driver` its version and `jetson` the release
    of Jetson Linux, both empty where there is none.
    """

    gpu: bool
    cuda_major: int
    driver: str
    jetson: str

    @classmethod
    def of(cls, cuda: Answer) -> Machine:
        """This machine, where the driver's library gave that answer."""
        major = int(str(cuda.found.get("cuda", "0")).partition(".")[0])
        driver, jetson = driver_version(), jetson_release()
        gpu = bool(driver or jetson or cuda.found.get("gpus")) or cuda.state == "broken" or on_pci()
        return cls(gpu, major, driver, jetson)

    @property
    def bindings(self) -> str:
        """What to install for cuda-bindings, whose major version must not be newer than the driver's."""
        bound = f" 'cuda-bindings<{self.cuda_major + 1}'" if self.cuda_major else ""
        return f"pip install 'streamtalk[cuda]'{bound}"


def examine(directory: Path) -> Iterator[Finding]:
    """Look at the machine, then try the model in `directory` on every backend; findings come as they are
    made. Raises nothing for what it finds.
    """
    yield _python()
    cuda = ask("cuda", timeout_s=PROBE_S)
    machine = Machine.of(cuda)
    yield _gpu(cuda, machine)
    yield _driver(cuda, machine)
    if machine.jetson:
        yield _power_mode()
    yield _tensorrt(ask("tensorrt", "tensorrt", timeout_s=PROBE_S), machine)
    yield _tensorrt_rtx(ask("tensorrt", "tensorrt_rtx", timeout_s=PROBE_S), machine)
    yield _cuda_bindings(ask("cuda-bindings", timeout_s=PROBE_S), machine)
    yield _onnxruntime(ask("onnxruntime", timeout_s=PROBE_S), machine)
    yield _audio(ask("audio", timeout_s=PROBE_S))
    try:
        manifest = read_manifest(directory)
    except (ModelError, OSError) as error:
        yield Finding("model", "broken", str(error))
        return
    yield _model(directory, manifest, machine)
    for name in available():
        with progress(f"Loading {directory} on {name}"):
            answer = ask("load", str(directory), name, timeout_s=LOAD_S)
        yield _backend(name, answer)


def verdict(directory: Path, findings: Sequence[Finding]) -> tuple[bool, str]:
    """Whether a backend can run the model, and the sentence that says so."""
    usable = [finding.backend for finding in findings if finding.backend and finding.state == "ok"]
    if usable:
        others = f"; so can {', '.join(usable[1:])}" if usable[1:] else ""
        return True, f"{directory} runs here on {usable[0]}{others}."
    by_name = {finding.name: finding for finding in findings}
    model, cpu = by_name["model"], by_name["onnxruntime"]
    if model.state != "ok":
        return False, f"There is no model that could run. {model.text}"
    # Of all backends it is the one that needs no GPU.
    hint = f"The shortest way to one that can: {cpu.todo}" if cpu.state != "ok" else "See the lines above."
    return False, f"No backend can run {directory} here. {hint}"


def as_text(finding: Finding) -> str:
    """Lines for people: a mark, the name, the text; below it what to do."""
    mark = {"ok": "ok", "absent": "--", "broken": "!!"}[finding.state]
    margin = " " * (NAME_WIDTH + 4)
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    lines = textwrap.wrap(finding.text, width - len(margin), break_long_words=False, break_on_hyphens=False)
    first, *rest = lines or [""]
    head = f"{mark}  {finding.name:<{NAME_WIDTH}}{first}"
    # What to do stays on one line: it is there to be copied.
    todo = [f"{margin}-> {finding.todo}"] if finding.todo else []
    return "\n".join([head, *(margin + line for line in rest), *todo])


def jetson_release(file: Path = Path("/etc/nv_tegra_release")) -> str:
    """The release of Jetson Linux, such as `R36.4.7`; empty where this is no Jetson."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return ""
    match = re.search(r"R(\d+)\b.*?REVISION:\s*([\d.]+)", text)
    return f"R{match[1]}.{match[2]}" if match else "an unknown release"


def driver_version() -> str:
    """From the kernel, else from nvidia-smi (Windows, WSL); empty without a driver."""
    if build := driver_build():
        return build
    match = BUILD.search(_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    return match[0] if match else ""


def on_pci(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether a display adapter of NVIDIA's is on the bus, with or without a driver."""

    def read(file: Path) -> str:
        try:
            return file.read_text()
        except OSError:
            return ""

    return any(
        read(device / "vendor").startswith(NVIDIA_PCI) and read(device / "class").startswith(DISPLAY_CLASS)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def _python() -> Finding:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    version = platform.python_version()
    system = f"{platform.system()} {platform.machine()}"
    text = f"{version}, StreamTalk {streamtalk.__version__}, {system}, {cores} CPU cores usable"
    details = {"version": version, "executable": sys.executable, "cpu_cores": cores}
    return Finding("Python", "ok", text, details=details)


def _gpu(answer: Answer, machine: Machine) -> Finding:
    if answer.state == "broken":
        return Finding(
            "NVIDIA GPU",
            "broken",
            answer.reason,
            "If the driver was just updated, reboot; else see what nvidia-smi says.",
        )
    cards = answer.found.get("gpus", [])
    if cards:
        text = "; ".join(
            f"{card['name']}, compute capability {card['compute_capability']}, {card['memory_gib']} GiB"
            for card in cards
        )
        return Finding("NVIDIA GPU", "ok", text, details={"gpus": cards})
    text = f"none: {answer.reason or 'the driver knows no device'}"
    if machine.jetson or machine.driver:
        todo = "In a container: start it with --gpus all (Jetson: --runtime nvidia)."
        return Finding("NVIDIA GPU", "broken", text, todo)
    if machine.gpu:
        todo = "sudo ubuntu-drivers install (Ubuntu; else https://www.nvidia.com/drivers), then reboot."
        return Finding("NVIDIA GPU", "broken", f"{text}; there is one on the PCI bus without a driver", todo)
    return Finding("NVIDIA GPU", "absent", text)


def _driver(answer: Answer, machine: Machine) -> Finding:
    cuda = answer.found.get("cuda", "")
    version = machine.driver
    parts = [
        f"Jetson Linux {machine.jetson}" if machine.jetson else "",
        version,
        f"CUDA {cuda}" if cuda else "",
    ]
    text = ", ".join(part for part in parts if part)
    details = {"driver": version, "cuda": cuda, "jetson_linux": machine.jetson}
    return Finding("driver", "ok" if text else "absent", text or "none", details=details)


def _power_mode() -> Finding:
    match = re.search(r"Power Mode:\s*(\S+)", _output("nvpmodel", "-q"))
    if not match:
        return Finding("power mode", "absent", "nvpmodel does not say", "sudo nvpmodel -q")
    mode = match[1]
    todo = (
        ""
        if mode.startswith("MAXN")
        else "For measuring: sudo nvpmodel -m N, N that of MAXN in /etc/nvpmodel.conf; sudo jetson_clocks"
    )
    return Finding("power mode", "ok", mode, todo, details={"mode": mode})


def _tensorrt(answer: Answer, machine: Machine) -> Finding:
    name, system = "TensorRT", sorted(Path("/usr/lib").glob("python3*/dist-packages/tensorrt"))
    if answer.state == "ok":
        return _version(name, answer)
    if machine.jetson:
        todo = "sudo apt install python3-libnvinfer, and a venv made with --system-site-packages (not pip's tensorrt)"
        if system:
            todo = (
                f"{system[0]} is not seen: python3 -m venv --system-site-packages, with the system's Python"
            )
        return Finding(name, "broken", answer.reason, todo)
    return _optional(name, answer, machine, "pip install 'streamtalk[tensorrt]'")


def _tensorrt_rtx(answer: Answer, machine: Machine) -> Finding:
    name = "TensorRT-RTX"
    if answer.state == "ok":
        return _version(name, answer)
    if machine.jetson and answer.state == "absent":
        return Finding(name, "absent", "not installed; a Jetson takes the system's TensorRT")
    return _optional(name, answer, machine, "pip install 'streamtalk[rtx]'")


def _optional(name: str, answer: Answer, machine: Machine, todo: str) -> Finding:
    """Something that only a GPU needs: without one, nothing needs doing."""
    if machine.gpu or answer.state == "broken":
        return Finding(name, answer.state, answer.reason, todo)
    return Finding(name, "absent", f"{answer.reason}; of use only with an NVIDIA GPU")


def _version(name: str, answer: Answer) -> Finding:
    found = answer.found
    return Finding(name, "ok", f"{found['version']} in {found['path']}", details=found)


def _cuda_bindings(answer: Answer, machine: Machine) -> Finding:
    name, found = "cuda-bindings", answer.found
    if answer.state != "ok":
        return _optional(name, answer, machine, machine.bindings)
    version = str(found["version"])
    if machine.cuda_major and int(version.partition(".")[0]) > machine.cuda_major:
        text = f"{version} is made for a newer driver than this one with CUDA {machine.cuda_major}"
        return Finding(name, "broken", text, machine.bindings, details=found)
    if found["error"] and machine.gpu:
        text = f"{version} cannot reach the driver: {found['error']}"
        return Finding(name, "broken", text, machine.bindings, details=found)
    return Finding(name, "ok", version, details=found)


def _onnxruntime(answer: Answer, machine: Machine) -> Finding:
    name, found = "onnxruntime", answer.found
    # PyPI's onnxruntime-gpu is not made for a Jetson's GPU, which takes TensorRT.
    wants_gpu = machine.gpu and not machine.jetson
    package = f"pip install 'streamtalk[{'gpu' if wants_gpu else 'cpu'}]'"
    replace = f"pip uninstall -y onnxruntime onnxruntime-gpu && {package}"
    if answer.state != "ok":
        todo = package if answer.state == "absent" else replace
        return Finding(name, answer.state, answer.reason, todo)
    providers = ", ".join(provider.removesuffix("ExecutionProvider") for provider in found["providers"])
    text = f"{found['version']}, providers {providers}"
    if len(found["packages"]) > 1:
        both = " and ".join(found["packages"])
        return Finding(name, "broken", f"{text}; {both} overwrite each other", replace, details=found)
    todo = replace if wants_gpu and "CUDAExecutionProvider" not in found["providers"] else ""
    return Finding(name, "ok", text, todo and f"To use the GPU with it: {todo}", details=found)


def _audio(answer: Answer) -> Finding:
    name, found = "audio", answer.found
    if answer.state != "ok":
        todo = "pip install sounddevice" if "package" in answer.reason else "sudo apt install libportaudio2"
        return Finding(name, answer.state, answer.reason, todo)
    inputs = found["inputs"]
    if not inputs:
        text = f"{found['library']}; no input device"
        return Finding(
            name, "absent", text, "Plug a microphone in, or use --wav FILE or --stdin.", details=found
        )
    listed = "; ".join(f"{'*' if d['is_default'] else ''}{d['index']} {d['name']}" for d in inputs)
    return Finding(name, "ok", f"inputs {listed}", details=found)


def _model(directory: Path, manifest: Manifest, machine: Machine) -> Finding:
    """Every file that the manifest lists, compared with its hash."""
    files = {name: sha256 for graph in manifest.graphs.values() for name, sha256 in graph.files.items()}
    files[manifest.identity] = manifest.identity_sha256
    assets = (asset for asset in (manifest.blendshapes, manifest.probe) if asset)
    files.update({asset.file: asset.sha256 for asset in assets})
    files.update({engine.file: engine.sha256 for engine in manifest.engines})
    damage = [problem for name, sha256 in files.items() if (problem := _damage(directory, name, sha256))]
    engines = [
        f"{engine.file} ({engine.backend} {engine.tensorrt_version}, {engine.precision}, compute capability "
        f"{engine.compute_capability})"
        for engine in manifest.engines
    ]
    built = f"engines {', '.join(engines)}" if engines else "no TensorRT engines"
    details = {"directory": str(directory), "engines": engines, "damaged": damage}
    if damage:
        return Finding(
            "model",
            "broken",
            " ".join(damage),
            "python export.py, with the options it was made with",
            details=details,
        )
    text = f"{manifest.name} in {directory}, {len(files)} files as exported, {built}"
    todo = ""
    if machine.jetson and not any(engine.backend == "tensorrt" for engine in manifest.engines):
        todo = f"Here: {how_to_build(directory, 'tensorrt')}"
    elif machine.gpu and not manifest.engines:
        todo = f"For a GPU: {how_to_build(directory, 'tensorrt_rtx')} (or tensorrt)"
    return Finding("model", "ok", text, todo, details=details)


def _damage(directory: Path, name: str, sha256: str) -> str:
    try:
        verified(directory, name, sha256)
    except (ModelError, OSError) as error:
        return str(error)
    return ""


def _backend(name: str, answer: Answer) -> Finding:
    found = answer.found
    if answer.state == "ok":
        text = f"loads in {found['load_s']} s: {found['description']}"
        text += "".join(f"; {form} was passed over: {why}" for form, why in found["passed_over"].items())
        return Finding(f"  {name}", "ok", text, backend=name, details=found)
    return Finding(f"  {name}", "broken", answer.reason, backend=name)


def _output(*command: str) -> str:
    """What a program prints; empty where there is none or it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PROBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""

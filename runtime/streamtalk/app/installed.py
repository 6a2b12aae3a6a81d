"""What is installed here, asked in a process of its own: a library that crashes or hangs takes its answer
along and nothing else.

`ask` runs one of the functions in `PROBES` in a child with the parent's import path.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from streamtalk.app.audio.devices import input_devices
from streamtalk.errors import StreamTalkError
from streamtalk.talker import Talker

State = Literal["ok", "absent", "broken"]
Found = dict[str, Any]

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from streamtalk.app.installed import answer; answer(sys.argv[2:])"
)
CUDA_SUCCESS = 0
CUDA_NO_DEVICE = 100
COMPUTE_CAPABILITY = (75, 76)
"""CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Answer:
    """What a probe saw: `found` if it is there, else the reason in one sentence."""

    state: State
    reason: str = ""
    found: Found = field(default_factory=dict)


class NotInstalledError(Exception):
    """What was asked for is not installed; the text says so."""


def ask(name: str, *arguments: str, timeout_s: float) -> Answer:
    """Run a probe in a child process. Never raises for what happens there."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), name, *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer("broken", f"no answer within {timeout_s:.0f} s")
    except OSError as error:
        return Answer("broken", f"no process could be started: {error}")
    if done.returncode < 0:
        return Answer("broken", f"crashed with {_signal_name(-done.returncode)}")
    try:
        return Answer(**json.loads(done.stdout))
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return Answer("broken", f"ended with code {done.returncode}: {last}")


def answer(arguments: Sequence[str]) -> None:
    """In the child: run the probe that `arguments` name and write its Answer to stdout as JSON."""
    # Libraries print what they like on stdout; the answer keeps it to itself.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, *rest = arguments
    try:
        result = Answer("ok", found=PROBES[name](*rest))
    except NotInstalledError as error:
        result = Answer("absent", str(error))
    except Exception as error:
        # Anything may come out of a foreign library, and all of it is a finding.
        text = str(error) if isinstance(error, StreamTalkError) else f"{type(error).__name__}: {error}"
        result = Answer("broken", text)
    with out:
        json.dump(asdict(result), out)
        out.flush()
    os._exit(0)  # some libraries crash while they are unloaded; the answer is out


def cuda() -> Found:
    """The driver's CUDA version and GPUs, by its own C library: no package is needed for that."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise NotInstalledError(f"{name} is not here") from error
    return gpus(library)


def gpus(library: Any) -> Found:
    """`{cuda, gpus: [{name, compute_capability, memory_gib}]}` from libcuda, loaded."""

    def call(function: str, *arguments: Any) -> None:
        code = getattr(library, function)(*arguments)
        if code != CUDA_SUCCESS:
            raise RuntimeError(f"{function} gave CUDA error {code}")

    number = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(number))
    found: Found = {"cuda": f"{number.value // 1000}.{number.value % 1000 // 10}", "gpus": []}
    if (code := library.cuInit(0)) == CUDA_NO_DEVICE:
        return found
    if code != CUDA_SUCCESS:
        raise RuntimeError(f"cuInit gave CUDA error {code}")
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    for index in range(count.value):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        call("cuDeviceGet", ctypes.byref(device), index)
        label = ctypes.create_string_buffer(256)
        call("cuDeviceGetName", label, len(label), device)
        call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        capability = []
        for attribute in COMPUTE_CAPABILITY:
            call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            capability.append(str(number.value))
        found["gpus"].append(
            {
                "name": label.value.decode(errors="replace"),
                "compute_capability": ".".join(capability),
                "memory_gib": round(size.value / 2**30, 1),
            }
        )
    return found


def cuda_bindings() -> Found:
    """`{version, error}`; `error` is empty where the bindings reach the driver."""
    _import("cuda.bindings")
    driver = importlib.import_module("cuda.bindings.driver")
    try:
        code = driver.cuInit(0)[0]
        error = "" if int(code) == CUDA_SUCCESS else f"cuInit gave {code}"
    except RuntimeError as failure:  # no libcuda
        error = str(failure)
    return {"version": metadata.version("cuda-bindings"), "error": error}


def tensorrt(module: str) -> Found:
    """The version of `tensorrt` or `tensorrt_rtx`, and where it lies."""
    imported = _import(module)
    return {"version": str(imported.__version__), "path": str(Path(imported.__file__).parent)}


def onnxruntime() -> Found:
    """`{version, providers, packages}`; the packages are what pip knows of that share the module."""
    packages = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    imported = _import("onnxruntime")
    providers = [str(name) for name in imported.get_available_providers()]
    return {"version": str(imported.__version__), "providers": providers, "packages": packages}


def audio() -> Found:
    """`{library, inputs}`: PortAudio's version, and its inputs as dictionaries."""
    sounddevice = _sounddevice()
    return {
        "library": sounddevice.get_portaudio_version()[1],
        "inputs": [asdict(device) for device in input_devices(sounddevice)],
    }


def load(directory: str, backend: str) -> Found:
    """Load an exported model on one backend, its trial hop included."""
    began = perf_counter()
    choice = Talker.load(directory, backend).choice
    times = {"first_hop_s": choice.first_hop_s, "load_s": perf_counter() - began}
    return {
        "description": choice.backend.description,
        "passed_over": choice.passed_over,
        **{name: round(s, 2) for name, s in times.items()},
    }


PROBES: dict[str, Callable[..., Found]] = {
    "cuda": cuda,
    "cuda-bindings": cuda_bindings,
    "tensorrt": tensorrt,
    "onnxruntime": onnxruntime,
    "audio": audio,
    "load": load,
}


def _sounddevice() -> Any:
    try:
        return _import("sounddevice")
    except OSError as error:  # its C library
        raise NotInstalledError("the system's library PortAudio is not installed") from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that it imports being missing is a broken installation.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise NotInstalledError("not installed") from error
        raise


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

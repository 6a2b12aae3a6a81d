"""The package imports where nothing optional is installed, and importing it does nothing."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONAL = (
    "torch onnx onnxruntime onnxscript tensorrt tensorrt_rtx cuda transformers safetensors yaml scipy "
    "sounddevice soxr av moderngl glcontext PIL websockets matplotlib streamtalk_export streamtalk_training"
).split()

PROBE = """
import importlib, json, pkgutil, sys, threading

optional = set(json.loads(sys.argv[1]))
begun = set(sys.modules)  # what an installed package loads with the interpreter, as cuda-bindings 12.9 does

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            raise ImportError(f"{name} is not installed in this test")

sys.meta_path.insert(0, Absent())
import streamtalk
names = [module.name for module in pkgutil.walk_packages(streamtalk.__path__, "streamtalk.", onerror=print)]
for name in names:
    importlib.import_module(name)
loaded = sorted(optional & {name.partition(".")[0] for name in set(sys.modules) - begun})
print(json.dumps({"modules": names, "loaded": loaded, "threads": threading.active_count()}))
"""


FIRST = """
import importlib, json, os, pkgutil, sys, types
import numpy, msgspec  # what all of them may take; loaded once

root = importlib.util.find_spec("streamtalk").submodule_search_locations
names = [module.name for module in pkgutil.walk_packages(list(root), "streamtalk.", onerror=lambda _: None)]

def alone(name):
    \"\"\"Import a module in a process of its own, with nothing in the package root.\"\"\"
    for loaded in [key for key in sys.modules if key.partition(".")[0] == "streamtalk"]:
        del sys.modules[loaded]
    bare = types.ModuleType("streamtalk")
    bare.__path__ = list(root)
    sys.modules["streamtalk"] = bare
    importlib.import_module(name)

failed = {}
for name in names:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            alone(name)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        if said := answer.read().decode():
            failed[name] = said
    os.wait()
print(json.dumps({"names": names, "failed": failed}))
"""


def probe(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_every_module_imports_without_anything_optional() -> None:
    done = probe(PROBE, json.dumps(OPTIONAL))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    for name in (
        "talker",
        "app.cli",
        "backends.onnxruntime",
        "app.audio.microphone",
        "viewer.render",
        "app.output.film",
    ):
        assert f"streamtalk.{name}" in result["modules"]
    assert result["loaded"] == []
    assert result["threads"] == 1


def test_a_missing_backend_is_a_sentence(engine: object) -> None:
    code = (
        PROBE
        + """
try:
    streamtalk.Talker.load(sys.argv[2], backend=sys.argv[3])
except streamtalk.StreamTalkError as error:
    print(type(error).__name__, error)
"""
    )
    for backend, kind in (("onnxruntime-cpu", "MissingDependencyError"), ("auto", "BackendError")):
        done = probe(code, json.dumps(OPTIONAL), str(engine), backend)
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert last.startswith(kind)
        assert "pip install 'streamtalk[cpu]'" in last


def test_what_is_installed_is_not_loaded_before_it_is_asked_for() -> None:
    done = probe(
        "import sys; begun = set(sys.modules); import streamtalk.app.cli; print(sorted(set(sys.modules) - begun))"
    )
    assert done.returncode == 0, done.stderr
    roots = {name.partition(".")[0] for name in json.loads(done.stdout.replace("'", '"'))}
    assert not roots & set(OPTIONAL)


def test_each_module_imports_first_and_alone() -> None:
    """Directions of imports hold without the package root, which would import the core beforehand."""
    done = probe("import importlib.util\n" + FIRST)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"streamtalk.batch", "streamtalk.app.cli", "streamtalk.backends.cuda.rows"} <= set(result["names"])
    assert len(result["names"]) > 50
    assert result["failed"] == {}

"""Record the names and parameters of TensorRT's Python bindings, for `tests/tensorrt_api.py`:

    python tests/data/tensorrt_api.py DIR ... >tests/data/tensorrt_api.json

Each `DIR` holds an unpacked wheel of `tensorrt-cu12-bindings` or `tensorrt-rtx-cu12-bindings`. The libraries behind the
first are not on PyPI and need a GPU: the C compiler makes empty ones in their place, since nothing is called.
Names and parameters are read from the docstrings that pybind11 writes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = ("tensorrt_bindings", "tensorrt_rtx_bindings")
CLASSES = (
    "Builder IBuilderConfig ICudaEngine IExecutionContext INetworkDefinition IOptimizationProfile "
    "IRuntimeCache IRuntimeConfig ITensor ITimingCache OnnxParser ParserError Runtime"
).split()
ENUMERATIONS = (
    "BuilderFlag ComputeCapability DataType ExecutionContextAllocationStrategy NetworkDefinitionCreationFlag "
    "TensorIOMode TensorLocation"
).split()
LIBRARIES = (
    "nvinfer.so.10 nvinfer_plugin.so.10 nvonnxparser.so.10 nvinfer.so.11 nvinfer_plugin.so.11 nvonnxparser.so.11 "
    "tensorrt_rtx.so.1 tensorrt_onnxparser_rtx.so.1"
).split()
SYMBOLS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry getLogger "
    "getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
).split()


def main(folders: list[str]) -> None:
    """Record each version in a process of its own."""
    if not folders:  # as one of those processes
        name = next(module for module in MODULES if Path(os.environ["BINDINGS"], module).is_dir())
        module = importlib.import_module(name)
        key = f"{name.removesuffix('_bindings')} {module.__version__}"
        print(json.dumps({key: record(module)}))
        return
    api: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as libraries:
        source = Path(libraries, "empty.c")
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
        for library in LIBRARIES:
            subprocess.run(
                ["cc", "-shared", "-fPIC", "-o", f"{libraries}/lib{library}", str(source)], check=True
            )
        for folder in folders:
            paths = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": folder, "BINDINGS": folder}
            said = subprocess.run(
                [sys.executable, __file__], env=os.environ | paths, check=True, stdout=subprocess.PIPE
            ).stdout
            api |= json.loads(said)
    json.dump(api, sys.stdout, indent=1, sort_keys=True)
    print()


def record(trt: Any) -> dict[str, Any]:
    """Return each class's members (a method's overloads, null for a property) and each enumeration's names.

    Methods that add a layer are left out: the parser adds them.
    """
    found: dict[str, Any] = {}
    for name in CLASSES:
        if (kind := getattr(trt, name, None)) is not None:
            names = (n for n in dir(kind) if not n.startswith("_"))
            members = {n: getattr(kind, n) for n in names if (name, n[:4]) != ("INetworkDefinition", "add_")}
            found[name] = {
                n: None if isinstance(member, property) else " | ".join(overloads(member.__doc__ or ""))
                for n, member in members.items()
            }
    return found | {n: " ".join(sorted(getattr(trt, n).__members__)) for n in ENUMERATIONS if hasattr(trt, n)}


def overloads(docstring: str) -> Iterator[str]:
    """Return `(a, b=...) -> C` for each line `name(self: X, a: T, b: T = 1) -> module.C`."""
    for line in docstring.splitlines():
        if heading := re.match(r"(?:\d+\. )?\w+\(self: (.*)\) -> (?:.*\W)?(\w+\]*)$", line):
            _, *parameters = split(heading.group(1))
            yield f"({', '.join(map(parameter, parameters))}) -> {heading.group(2)}"


def parameter(text: str) -> str:
    """Return a parameter's name, with `=...` where it has a default."""
    return text.partition(":")[0].strip() + ("=..." if " = " in text else "")


def split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


if __name__ == "__main__":
    main(sys.argv[1:])

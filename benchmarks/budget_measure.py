"""The same roofline on the processor at hand: calibrated with plain operators, then checked against what each graph
takes in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.budget_count import Count
from benchmarks.budget_model import Roof

ROUNDS = 7
ROUND_S = 0.04
FOOTPRINTS_MB = (1, 4, 16, 64, 256)
"""Memory is as fast as the cache that holds it: a graph is predicted with the rate at its own size."""
ROWS, COLUMNS, DEPTH = 128, 512, 1024
ERF_ELEMENTS = 1 << 16
EMPTY_NODES = 256

Run = Callable[[], Any]


@dataclass(frozen=True)
class Calibration:
    """Speed of the processor in the best case, in `Roof`'s units. By footprint in megabytes: `bytes` that a product
    of one row reads of its weights a second, as most kernels of a frame do, and those of a plain copy beside it,
    which shows what share of the memory's speed a product gets. `host_s` is a run of a graph that does nothing.
    """

    flops: float
    ops: float
    bytes: dict[int, float]
    copy_bytes: dict[int, float]
    launch_s: float
    host_s: float

    def roof(self, count: Count) -> Roof:
        """The roof over a graph of this size."""
        megabytes = (count.total("weight_bytes") + count.activation_bytes) / 1e6
        size = next((size for size in FOOTPRINTS_MB if size >= megabytes), FOOTPRINTS_MB[-1])
        return Roof(self.flops, self.flops, self.ops, self.bytes[size], self.launch_s)


@dataclass(frozen=True)
class Check:
    """A graph predicted and measured, in milliseconds."""

    graph: str
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Of the prediction: +1 is twice as long as it took."""
        return self.predicted_ms / self.measured_ms - 1


def check(graphs: Mapping[str, tuple[Path | onnx.ModelProto, Count]]) -> tuple[Calibration, list[Check]]:
    """Calibrate and measure in turns, several rounds, and compare, all on one thread. What counts is that thread's
    own processor time, and the best round: others on the machine can only take time and caches away.
    """
    runs = {f"=copy {size}": _run(_copy(size)) for size in FOOTPRINTS_MB}
    runs |= {f"=row {size}": _run(_product(1, size * 250_000 // DEPTH)) for size in FOOTPRINTS_MB}
    runs |= {"=product": _run(_product(ROWS, COLUMNS)), "=erf": _run(_erf())}
    runs |= {"=empty": _run(_empty(EMPTY_NODES)), "=nothing": _run(_empty(1))}
    runs |= {name: _run(path) for name, (path, _) in graphs.items()}
    best = _best(runs)
    calibration = Calibration(
        flops=2 * ROWS * COLUMNS * DEPTH / best["=product"],
        ops=ERF_ELEMENTS / best["=erf"],
        bytes={size: size * 1e6 / best[f"=row {size}"] for size in FOOTPRINTS_MB},
        copy_bytes={size: size * 1e6 / best[f"=copy {size}"] for size in FOOTPRINTS_MB},
        launch_s=(best["=empty"] - best["=nothing"]) / (EMPTY_NODES - 1),
        host_s=best["=nothing"],
    )
    return calibration, [
        Check(name, 1e3 * calibration.host_s + calibration.roof(count).milliseconds(count), 1e3 * best[name])
        for name, (_, count) in graphs.items()
    ]


def _best(runs: Mapping[str, Run], rounds: int = ROUNDS) -> dict[str, float]:
    """Processor seconds of the best run of each, in rounds that take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            n, began = 0, perf_counter()
            while n < 2 or perf_counter() - began < ROUND_S:
                once = thread_time()
                run()
                best[name] = min(best[name], thread_time() - once)
                n += 1
    return best


def _run(model: Path | onnx.ModelProto) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {value.name: _values(rng, value.type, value.shape) for value in session.get_inputs()}
    return lambda: session.run(None, feeds)


def _values(rng: np.random.Generator, kind: str, shape: Iterable[int]) -> npt.NDArray[Any]:
    if kind == "tensor(float)":
        return (0.1 * rng.standard_normal(tuple(shape))).astype(np.float32)
    return np.ones(tuple(shape), {"tensor(int64)": np.int64, "tensor(bool)": np.bool_}[kind])


def _product(rows: int, columns: int) -> onnx.ModelProto:
    weights = np.full((DEPTH, columns), 0.01, np.float32)
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], (rows, DEPTH), {"w": weights})


def _copy(megabytes: int) -> onnx.ModelProto:
    one = np.ones((), np.float32)  # an addition, for a plain copy is optimised away
    return _model([helper.make_node("Add", ["x", "w"], ["y"])], (megabytes * 125_000,), {"w": one})


def _erf() -> onnx.ModelProto:
    return _model([helper.make_node("Erf", ["x"], ["y"])], (ERF_ELEMENTS,), {})


def _empty(n: int) -> onnx.ModelProto:
    names = ["x", *(f"h{i}" for i in range(n - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(n)]
    return _model(nodes, (1, 8), {"w": np.eye(8, dtype=np.float32)})


def _model(
    nodes: list[Any], shape: tuple[int, ...], weights: Mapping[str, npt.NDArray[np.float32]]
) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    tensors[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "calibration", tensors[:1], tensors[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

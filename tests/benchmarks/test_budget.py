"""The counts against arithmetic done by hand and graphs exported otherwise; the roofline; the command."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from benchmarks.budget import main
from benchmarks.budget_count import KNOWN, Count, CountError, Kernel, count, count_model
from benchmarks.budget_measure import check
from benchmarks.budget_model import COMPUTE_SHARE, MEMORY_SHARE, Roof, Setup, catalogue, predict
from benchmarks.budget_trace import Tracer
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.graph_files import OPERATORS
from streamtalk_export.half import to_half
from tests.runtime.toy import Toy
from tests.small_model import TINY

FLOAT = 4
"""Bytes."""
SCALARS = 64
"""Bytes of constants such as row numbers, which are no weights of the model."""


def model(
    nodes: list[Any], inputs: dict[str, Any], outputs: list[str], weights: dict[str, Any]
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", infos, ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def one(kind: str, shapes: dict[str, Any], weights: dict[str, tuple[int, ...]], **attributes: Any) -> Count:
    """The count of a graph of one node."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights.items()}
    node = helper.make_node(kind, [*shapes, *weights], ["y"], **attributes)
    return count_model(model([node], shapes, ["y"], arrays), "one")


def figures(c: Count) -> dict[str, int]:
    return {field.name: c.total(field.name) for field in fields(Kernel) if field.name not in ("op", "half")}


@pytest.mark.parametrize(
    ("counted", "macs", "ops", "weights", "read", "written"),
    [
        (one("MatMul", {"x": [2, 3, 5]}, {"w": (5, 7)}), 210, 0, 35, 30, 42),
        (one("MatMul", {"x": [2, 4, 3, 5], "z": [2, 4, 5, 6]}, {}), 720, 0, 0, 360, 144),
        (one("Gemm", {"x": [3, 5]}, {"w": (7, 5), "b": (7,)}, transB=1), 105, 21, 42, 15, 21),
        (one("Gemm", {"x": [5, 3]}, {"w": (7, 5)}, transA=1, transB=1), 105, 0, 35, 15, 21),
        (one("Conv", {"x": [1, 4, 10]}, {"w": (6, 4, 3), "b": (6,)}), 576, 48, 78, 40, 48),
        (
            one("Conv", {"x": [2, 4, 10]}, {"w": (8, 2, 3)}, group=2, strides=[2], pads=[1, 1]),
            480,
            0,
            48,
            80,
            80,
        ),
        (one("Erf", {"x": [3, 4]}, {}), 0, 12, 0, 12, 12),
        (one("Add", {"x": [3, 4], "z": [4]}, {}), 0, 12, 0, 16, 12),
        (one("Softmax", {"x": [3, 4]}, {}), 0, 60, 0, 12, 12),
        (one("LayerNormalization", {"x": [3, 4]}, {"s": (4,), "b": (4,)}), 0, 84, 8, 12, 12),
        (one("Transpose", {"x": [3, 4]}, {}), 0, 0, 0, 12, 12),
        (one("Concat", {"x": [3, 4], "z": [2, 4]}, {}, axis=0), 0, 0, 0, 20, 20),
    ],
    ids=lambda value: value.kernels[0].op if isinstance(value, Count) else "",
)
def test_one_operator(counted: Count, macs: int, ops: int, weights: int, read: int, written: int) -> None:
    assert figures(counted) == {
        "macs": macs,
        "ops": ops,
        "weight_bytes": FLOAT * weights,
        "read_bytes": FLOAT * read,
        "write_bytes": FLOAT * written,
    }


def test_pointwise_runs_with_the_product_before_it_and_views_are_free() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("Tanh", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["f"]),
        helper.make_node("Add", ["f", "e"], ["y"]),
    ]
    w, b = np.zeros((4, 4), np.float32), np.zeros(4, np.float32)
    c = count_model(model(nodes, {"x": [6, 4]}, ["y"], {"w": w, "b": b, "shape": np.array([6, 4])}), "g")
    assert [k.op for k in c.kernels] == ["MatMul", "MatMul"]
    first, second = c.kernels
    assert (first.ops, first.weight_bytes, first.read_bytes, first.write_bytes) == (48, 80, 96, 96)
    # `e` is read once, by the product and the addition behind it.
    assert (second.ops, second.weight_bytes, second.read_bytes, second.write_bytes) == (24, 64, 96, 96)


def test_what_is_picked_counts_and_not_what_it_is_picked_from() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["row"]),
        helper.make_node("Slice", ["x", "from", "to"], ["part"]),
        helper.make_node("Add", ["part", "row"], ["y"]),
    ]
    constants = {"table": np.zeros((100, 4), np.float32), "from": np.array([0]), "to": np.array([1])}
    graph = model(nodes, {"x": [50, 4]}, ["y"], constants)
    graph.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, [1]))
    c = count_model(graph, "g")
    assert c.total("weight_bytes") == 0
    # The index, the row and the part; and the row again, which the Gather has written for the kernel behind it.
    assert c.total("read_bytes") == 8 + 3 * 4 * FLOAT
    assert c.total("macs") == 0


def test_what_follows_from_constants_alone_costs_nothing() -> None:
    nodes = [helper.make_node("Exp", ["w"], ["v"]), helper.make_node("Add", ["x", "v"], ["y"])]
    c = count_model(model(nodes, {"x": [3]}, ["y"], {"w": np.zeros(3, np.float32)}), "g")
    assert (len(c.kernels), c.total("ops")) == (1, 3)


def test_an_operator_that_is_not_known_is_an_error() -> None:
    with pytest.raises(CountError, match="Einsum"):
        count_model(
            model([helper.make_node("Einsum", ["x"], ["y"], equation="ij->ji")], {"x": [2, 3]}, ["y"], {}),
            "g",
        )


def test_everything_that_the_exporter_may_write_is_known() -> None:
    assert not OPERATORS - KNOWN


def test_a_size_that_nobody_gave_is_an_error() -> None:
    graph = model([helper.make_node("Erf", ["x"], ["y"])], {"x": ["samples//3 + 1", 2]}, ["y"], {})
    with pytest.raises(CountError, match="samples//3"):
        count_model(graph, "g")
    assert count_model(graph, "g", {"samples": 30}).total("ops") == 22


def test_a_file_that_is_no_graph_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 100)
    for name in ("a.onnx", "b.onnx"):
        with pytest.raises(CountError, match=name):
            count(tmp_path / name)


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    folder = tmp_path_factory.mktemp("traced")
    (folder / "tiny.yaml").write_text(TINY)
    return Tracer(str(folder / "tiny.yaml"))


ONE = Setup(hop=1, history=5, decode_window=6, batch=1)


def hop(tracer: Tracer, **settings: int) -> Count:
    """The count of a hop graph, `ONE` but for these settings."""
    return count_model(tracer.hop(replace(ONE, **settings)), "hop")


@pytest.mark.parametrize("frames", [1, 2])
def test_rows_are_counted_as_those_that_were_exported(tracer: Tracer, frames: int) -> None:
    one, three = hop(tracer, hop=frames), hop(tracer, hop=frames, batch=3)
    counted, exported = figures(one.batched(3)), figures(three)
    # Where each row's latents and tokens begin: the only constants that more rows have more of.
    assert 0 <= exported.pop("weight_bytes") - counted.pop("weight_bytes") <= SCALARS
    assert counted == exported
    assert one.batched(3).state_bytes == three.state_bytes


def test_a_hop_of_one_frame_costs_what_its_stages_cost(tracer: Tracer) -> None:
    stages = [count_model(graph, name) for name, graph in tracer.stages(ONE).items()]
    one = hop(tracer)
    assert one.total("macs") == sum(stage.total("macs") for stage in stages)
    apart = sum(stage.total("weight_bytes") for stage in stages)
    assert one.total("weight_bytes") == pytest.approx(apart, abs=SCALARS)


def test_a_hop_costs_less_than_its_frames_one_by_one(tracer: Tracer) -> None:
    """The decoder reads its weights once for all of them, and the encoder has one window."""
    one, four = hop(tracer), hop(tracer, hop=4)
    assert one.total("macs") < four.total("macs") < 4 * one.total("macs")
    decoder = count_model(tracer.stages(ONE)["vq_decoder"], "vq_decoder").total("weight_bytes")
    assert four.total("weight_bytes") < 4 * one.total("weight_bytes") - 2 * decoder


def test_more_history_and_a_longer_window_cost_what_they_must(tracer: Tracer) -> None:
    base, longer, wider = (hop(tracer, **more) for more in ({}, {"history": 8}, {"decode_window": 9}))
    # A key and a value of width 24 more, each frame and layer; nothing else depends on the history.
    assert longer.total("macs") - base.total("macs") == 3 * 2 * 2 * 24
    assert longer.state_bytes - base.state_bytes == 3 * 2 * 2 * 24 * FLOAT
    assert wider.state_bytes - base.state_bytes == 3 * 16 * FLOAT
    assert wider.total("weight_bytes") == pytest.approx(base.total("weight_bytes"), abs=SCALARS)
    assert wider.total("macs") > base.total("macs")


def test_weights_are_those_of_the_file(tracer: Tracer) -> None:
    graph = tracer.stages(ONE)["vq_decoder"]
    stored = sum(
        numpy_helper.to_array(t).nbytes
        for t in graph.graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) > 1
    )
    counted = count_model(graph, "vq_decoder").total("weight_bytes")
    assert counted == pytest.approx(stored, rel=0.1)  # biases, and tables


def test_half_moves_half(tracer: Tracer) -> None:
    graph = tracer.stages(ONE)["vq_decoder"]
    whole, half = count_model(graph, "whole"), count_model(to_half(graph), "half")
    assert half.total("macs") == whole.total("macs")
    assert 0.5 < half.total("weight_bytes") / whole.total("weight_bytes") < 0.9  # the islands stay float32
    assert any(k.half for k in half.kernels)
    assert not any(k.half for k in whole.kernels)


def test_the_roofline_takes_the_longer_of_two_and_adds_the_launch() -> None:
    roof = Roof(half_flops=2000, flops=1000, ops=100, bytes=10, launch_s=0.5)
    bound_by = {
        "arithmetic": Kernel("MatMul", macs=4000, ops=100, weight_bytes=1),
        "float16": Kernel("MatMul", macs=4000, ops=100, weight_bytes=1, half=True),
        "memory": Kernel("MatMul", macs=1, weight_bytes=20, read_bytes=10, write_bytes=10),
    }
    seconds = {name: roof.milliseconds(Count("g", (k,), 1, 0)) / 1e3 for name, k in bound_by.items()}
    assert seconds == {"arithmetic": 9.5, "float16": 5.5, "memory": 4.5}
    both = Count("g", (bound_by["arithmetic"], bound_by["memory"]), 2, 0)
    assert roof.milliseconds(both) == pytest.approx(14_000)


def test_devices_are_what_their_data_sheets_say() -> None:
    devices = {d.name: d for d in catalogue().devices}
    for family in (
        "3060",
        "4060",
        "4070",
        "4090",
        "5060",
        "5070",
        "5090",
        "Orin Nano",
        "Orin NX",
        "AGX Orin",
        "Thor",
    ):
        assert any(family in name for name in devices)
    rates = {
        "ampere": 512,
        "ada": 512,
        "blackwell": 512,
        "l4": 1024,
        "hopper": 4096,
        "orin-nano": 2048,
        "orin": 2048,
        "thor": 8192,
    }
    for d in devices.values():
        assert d.source in catalogue().sources
        assert "https://" in catalogue().sources[d.source]
        assert d.fp16_tflops == pytest.approx(d.sms * d.clock_ghz * rates[d.source] / 1e3, rel=0.01)
        assert d.fp32_tflops == pytest.approx(d.sms * (d.fp32_clock_ghz or d.clock_ghz) * 256 / 1e3, rel=0.01)
        assert d.roof.half_flops == pytest.approx(COMPUTE_SHARE * d.fp16_tflops * 1e12)
        assert d.roof.bytes == pytest.approx(MEMORY_SHARE * d.memory_gb_s * 1e9)


def test_a_frame_costs_its_share_of_a_hop() -> None:
    device = catalogue().devices[0]
    kernels = Kernel("MatMul", macs=10**9, half=True), Kernel("MatMul", weight_bytes=10**7)
    p = predict(device, Setup(4, 60, 60, 1), Count("hop", kernels, 2, 0))
    products_ms, traffic_ms = (
        2 / (COMPUTE_SHARE * device.fp16_tflops),
        10 / (MEMORY_SHARE * device.memory_gb_s),
    )
    assert p.hop_ms == pytest.approx(
        products_ms + traffic_ms + 2 * device.launch_us / 1e3 + device.host_us / 1e3
    )
    assert p.frame_ms == p.hop_ms / 4
    assert p.headroom(30) == pytest.approx(4 * 1000 / 30 / p.hop_ms)


def test_the_check_measures_what_it_predicts(tracer: Tracer) -> None:
    graph = tracer.hop(ONE)
    calibration, (result,) = check({"hop": (graph, count_model(graph, "hop"))})
    assert result.measured_ms > 0
    assert result.predicted_ms > 1e3 * calibration.host_s
    assert min(calibration.flops, calibration.ops, calibration.launch_s, *calibration.bytes.values()) > 0


def test_the_command_on_an_exported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Toy(rows=(1, 2)).write(tmp_path / "toy")
    files = ["--json", str(tmp_path / "a.json"), "--write", str(tmp_path / "a.md")]
    assert main(["--engine", str(engine), "--no-measure", *files]) == 0
    page = capsys.readouterr().out
    assert (tmp_path / "a.md").read_text() == page.removesuffix("\n")
    assert "predictions, not measurements" in page
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["prediction"] is True
    (toy,) = written["models"]
    assert {graph["graph"] for graph in toy["graphs"]["fp32"]} == {"hop", "hop_b2"}
    devices = len(catalogue().devices)
    assert len(toy["predictions"]) == 4 * devices
    assert {p["setup"]["batch"] for p in toy["predictions"]} == {1, 2, 4, 8}
    for p in toy["predictions"]:
        assert p["frame_ms"] == pytest.approx(p["hop_ms"] / 2)


def test_the_command_on_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    sizes = ["--hop", "2", "--history", "5", "--decode-window", "3", "--batch", "2"]
    assert main(["--config", str(tmp_path / "tiny.yaml"), "--no-measure", *sizes]) == 0
    page = capsys.readouterr().out
    for row in (
        "| 1 | 5 | 6 | 1 |",
        "| 2 | 5 | 6 | 1 |",
        "| 1 | 5 | 3 | 1 |",
        "| 1 | 5 | 6 | 2 |",
    ):
        assert row in page


def test_what_a_gpu_took_stands_beside_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Toy().write(tmp_path / "toy")
    row = {
        "preset": "toy",
        "variant": "",
        "extrapolated": False,
        "system": "tensorrt",
        "stage": "hop",
        "p50_ms": 0.05,
    }
    others = [
        {**row, "system": "onnxruntime-cpu"},
        {**row, "variant": "resident"},
        {**row, "stage": "vq_decoder"},
    ]
    four = {**row, "variant": "batch-4", "p50_ms": 0.06}
    (tmp_path / "m.json").write_text(json.dumps({"rows": [*others, row, four]}))
    files = ["--measured", str(tmp_path / "m.json"), "--json", str(tmp_path / "a.json")]
    assert main(["--engine", str(engine), "--no-measure", "--device", "RTX 4090", *files]) == 0
    (toy,) = json.loads((tmp_path / "a.json").read_text())["models"]
    found, more = toy["device_checks"]
    assert (found["measured_ms"], more["measured_ms"]) == (0.05, 0.06)
    assert "rows 4" in more["graph"]
    assert found["error"] == pytest.approx(found["predicted_ms"] / 0.05 - 1)
    assert "### Checked on RTX 4090" in capsys.readouterr().out
    assert main(["--engine", str(engine), "--no-measure", "--device", "abacus", *files]) == 2
    (tmp_path / "m.json").write_text(json.dumps({"rows": others}))
    assert main(["--engine", str(engine), "--no-measure", "--device", "RTX 4090", *files]) == 2
    (tmp_path / "m.json").write_text("[]")
    assert main(["--engine", str(engine), "--no-measure", "--device", "RTX 4090", *files]) == 2
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "nowhere"], "No exported model"),
        (["--engine", "{toy}", "--batch", "2", "--device", "RTX 4090"], "go together"),
        (["--config", "nowhere.yaml"], "neither a file nor a preset"),
        (["--engine", "{toy}", "--hop", "2"], "--config"),
        (["--engine", "{toy}", "--batch", "2", "--write", "nowhere/a.md"], "nowhere"),
    ],
)
def test_what_a_user_can_fix_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Toy().write(tmp_path / "toy")
    assert main([a.format(toy=engine) for a in [*arguments, "--no-measure"]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

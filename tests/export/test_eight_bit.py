"""Graphs with 8-bit weights: which products have them, and what they cost over a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from streamtalk import Talker
from streamtalk.manifest import Manifest
from streamtalk_export import cli, eight_bit
from streamtalk_export.eight_bit import SMALLEST, to_int8
from streamtalk_export.reduced_certificate import BOUNDS, certify_reduced
from tests.export.golden import Array, Driver, Golden
from tests.export.reduced import with_reduced

SECONDS = 4
"""Of the streams here; every export with --precision int8 runs 30 s."""

SMALL_SHARE = 0.1
"""Of the motion, at the 99th percentile, in models so narrow that a sum evens out little; measured: .05 and .07."""

Exported = Callable[[Golden, str], Driver]
Reduced = tuple[Path, Manifest, dict[str, Array]]


@pytest.fixture(scope="module")
def bundled_int8(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Reduced:
    return with_reduced(bundled, tmp_path_factory.mktemp("int8") / "model", "int8", ["frame"])


def integer_weights(model: onnx.ModelProto) -> set[str]:
    """Names of the weights that integer products read."""
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    read = {node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger"}
    assert all(kinds[name] == TensorProto.UINT8 for name in read)
    return {name.removesuffix("_int8") for name in read}


def product(rows: int, inner: int, columns: int, result: str = "y") -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])
    y = helper.make_tensor_value_info(result, TensorProto.FLOAT, [rows, columns])
    values = np.random.default_rng(0).standard_normal((inner, columns)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], [result])],
        "g",
        [x],
        [y],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_only_large_products_with_a_weight_are_rounded() -> None:
    assert integer_weights(to_int8(product(1, 256, SMALLEST // 256))) == {"w"}
    small = product(1, 256, SMALLEST // 256 - 1)
    assert to_int8(small) == small


def test_what_a_stream_feeds_back_stays_float32() -> None:
    fed_back = product(1, 256, 256, "latents_out")
    assert to_int8(fed_back) == fed_back


def test_sums_do_not_saturate() -> None:
    """The largest products that 8 bits allow: signed weights come out too small on processors without VNNI."""
    import onnxruntime

    model = product(1, 256, 128)
    weight = np.repeat([[1.0], [-1.0]], 128, axis=0).repeat(128, axis=1).astype(np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    session = onnxruntime.InferenceSession(
        to_int8(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.concatenate([np.ones((1, 128)), np.zeros((1, 128))], 1).astype(np.float32)
    assert np.allclose(session.run(None, {"x": x})[0], 128.0, rtol=0.01)


def test_the_bundled_graphs(bundled_int8: Reduced, bundled: Path) -> None:
    directory, manifest, _ = bundled_int8
    before = onnx.load(bundled / "frame.onnx")
    graph = manifest.graphs["frame.int8"]
    after = onnx.load(directory / graph.file)
    assert (list(after.graph.input), list(after.graph.output)) == (
        list(before.graph.input),
        list(before.graph.output),
    )
    assert after.ir_version == before.ir_version
    assert str(directory) not in str(after)  # a path of the exporting machine
    rounded = integer_weights(after)
    # The map onto the vertices is most of all weights; every step's last map is what the sampler adds up.
    sizes = {t.name: int(np.prod(t.dims)) for t in before.graph.initializer}
    assert max(sizes, key=lambda name: sizes[name]) in rounded
    assert not any("latent_vq_map" in name for name in rounded)
    assert (directory / graph.file).stat().st_size < 0.5 * (bundled / "frame.onnx").stat().st_size


def test_the_bundled_stream_in_8_bits(bundled_int8: Reduced) -> None:
    p99, largest, motion = certify_reduced(*bundled_int8, ["int8"], SECONDS)[:3]
    bounds = BOUNDS["int8"]
    assert p99.subject == "frame.int8"
    limits = bounds.limits_mm(motion.measured)
    assert (p99.bound, largest.bound) == (limits.p99, limits.max)
    assert 0 < p99.measured <= bounds.p99_mm
    assert largest.measured <= bounds.max_mm
    assert motion.measured > 2 * bounds.p99_mm  # bounds that a still face would meet say nothing


def test_the_cpu_backend_takes_8_bits_where_it_finds_them(bundled_int8: Reduced, bundled: Path) -> None:
    directory, _, _ = bundled_int8
    plain = Talker.load(bundled, "onnxruntime-cpu", threads=1)
    talker = Talker.load(directory, "onnxruntime-cpu", threads=1)
    assert (plain.choice.backend.precision, talker.choice.backend.precision) == ("fp32", "int8")
    assert "8-bit" in talker.choice.backend.description
    pcm = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.05
    made: list[Array] = []
    for of in (plain, talker, talker):
        with of.open(seed=3) as stream:
            made.append(np.stack([frame.vertices.copy() for frame in stream.push(pcm)]))
    assert np.array_equal(made[1], made[2])
    assert 0 < np.abs(made[0] - made[1]).max() < 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--targets", "tensorrt_rtx"], "for the CPU"), (["--batch", "2"], "hear of each other")],
)
def test_what_8_bits_are_not_for(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["--precision", "int8", *options, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_preset_stream_in_8_bits(
    golden: Golden, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product of the small checkpoints, in a closed loop."""
    monkeypatch.setattr(eight_bit, "SMALLEST", 1)
    source = exported(golden, "ddim").directory
    made = with_reduced(source, tmp_path / "m", "int8", ["frame"])
    p99, _, motion = certify_reduced(*made, ["int8"], SECONDS)
    assert 0 < p99.measured <= SMALL_SHARE * motion.measured

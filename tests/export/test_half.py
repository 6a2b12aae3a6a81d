"""Float16 hop graphs: where float16 is written, what it costs, and which part is the coarse one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from streamtalk import Talker
from streamtalk.model import graph_key, read_manifest
from streamtalk_export import half, probe
from streamtalk_export.checkpoint import load_model
from streamtalk_export.cli import main
from streamtalk_export.config import load_config
from streamtalk_export.excerpt import Excerpt
from streamtalk_export.graph_files import trace
from streamtalk_export.graphs import ConditionPredictor, Hop, NewestFrameDecoder, diffusion_head
from streamtalk_export.half import (
    DECODER,
    ENCODER,
    PARTS,
    PREDICTOR,
    coarsest_part,
    hold_roundings,
    islands,
    parts,
    to_half,
)
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.model import TalkerModel
from streamtalk_export.parity import read_identity
from streamtalk_export.sampler import sampler_table
from streamtalk_export.windows import StreamingEncoder, audio_window
from tests.export.golden import Array, load_golden
from tests.small_model import TINY

BUNDLED = Path(__file__).parents[2] / "models" / "bundled"
HOPS = [
    ("vocaset_small", 1, 1),
    ("vocaset_small", 4, 2),
    ("biwi_small", 1, 2),
    ("biwi_small", 4, 1),
    ("bundled", 1, 1),
]
"""Models, frames a hop and rows."""
HISTORY, WINDOW = 5, 6
"""The window is no multiple of what onnxruntime's attention wants."""
TOLERANCE = 2e-3
"""Of the largest value: four roundings to float16. Measured below 1e-3."""


@cache
def load(name: str) -> TalkerModel:
    if name != "bundled":
        return load_golden(name).model
    return load_model(load_config(BUNDLED / "config.yaml"), None, BUNDLED / "model.safetensors")


@cache
def traced(name: str, hop: int, rows: int, window: int = WINDOW) -> bytes:
    model = load(name)
    config, p, encoder = model.config, model.config.predictor, model.audio_encoder
    if isinstance(encoder, HubertEncoder):
        encoder.fuse()
    clock = audio_window(config, encoder, hop, None, None)
    table = sampler_table(config.schedule, config.steps, config.sampler)
    module = Hop(
        StreamingEncoder(encoder, clock, config.audio.level_floor),
        ConditionPredictor(model.diff_ar_network, HISTORY, hop),
        diffusion_head(model.diff_ar_network, table, p.head == "linear"),
        NewestFrameDecoder(model.autoencoder.decoder, window, rows, hop),
    )
    count = torch.ones(rows, dtype=torch.int64)
    inputs = {
        "pcm": torch.zeros(rows, clock.window_samples),
        "noise": torch.zeros(rows, hop, p.vq_dim),
        "style": torch.zeros(rows, p.latent_dim),
        "template": torch.zeros(rows, config.vq.n_vert),
        "position": count,
        "valid_frames": count,
        "valid_latents": count,
        "kv_cache": torch.zeros(rows, p.num_layers, 2, p.n_heads, HISTORY, p.latent_dim // p.n_heads),
        "latents": torch.zeros(rows, window, p.vq_dim),
        "active": torch.ones(rows, dtype=torch.bool),
    }
    model_proto = trace(module, inputs, ("vertices", "kv_cache_out", "latents_out"), "hop")
    serialized: bytes = model_proto.SerializeToString()
    return serialized


def hop_graph(name: str, hop: int, rows: int, window: int = WINDOW) -> onnx.ModelProto:
    """A float32 hop graph of a golden checkpoint or the bundled model, traced once."""
    return onnx.ModelProto.FromString(traced(name, hop, rows, window))


@pytest.fixture(params=HOPS, ids=lambda case: "{}-hop{}-rows{}".format(*case))
def case(request: pytest.FixtureRequest) -> tuple[str, int, int]:
    case: tuple[str, int, int] = request.param
    return case


@pytest.fixture
def graph(case: tuple[str, int, int]) -> onnx.ModelProto:
    return hop_graph(*case)


def ran(model: onnx.ModelProto, seed: int = 0, level: float = 0.1) -> dict[str, Array]:
    """Outputs by name for random inputs, audio of this RMS among them, the windows partly filled."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(seed)
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    feeds: dict[str, Array] = {}
    for given in session.get_inputs():
        values: Any = 3 + np.arange(given.shape[0])
        if "float" in given.type:
            values = rng.standard_normal(given.shape) * (level if given.name == "pcm" else 1.0)
        feeds[given.name] = values.astype(kinds[given.type])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def errors(got: dict[str, Array], want: dict[str, Array]) -> dict[str, float]:
    """Largest difference of each output, as a share of its largest value."""
    return {name: float(np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()) for name in want}


def weights_of(model: onnx.ModelProto, kind: int, within: Iterable[str] | None = None) -> set[str]:
    """Names of the products' weights of this type; `within` are the outputs of the products that count."""
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in half.PRODUCTS]
    chosen = products if within is None else [n for n in products if n.output[0] in set(within)]
    return {name for node in chosen for name in node.input if kinds.get(name) == kind}


def test_islands(graph: onnx.ModelProto, case: tuple[str, int, int]) -> None:
    """The products before a statistic, and the sampler's last ones of every frame. The decoder's convolution is a
    product whose weight the tracer names.
    """
    name, hop, _ = case
    kept = weights_of(to_half(graph), TensorProto.FLOAT)
    if name == "bundled":
        last = "head.network.latent_vq_map"
        assert kept == {"encoder.encoder.basis", "encoder.encoder.filters", f"{last}.weight", f"{last}.bias"}
        return
    head = {"head.from_noise.weight", "head.from_noise.bias", "head.from_condition.weight"}
    first = "encoder.encoder.hubert.feature_extractor.conv_layers.0.conv.weight"
    (convolution,) = kept - head - {first}
    assert kept - {convolution} == {first} | head
    sizes = {tensor.name: tensor.dims for tensor in graph.graph.initializer}
    assert sizes[convolution][0] == 5 * sizes[convolution][1]
    assert len(islands(graph.graph)) == 3 + hop


def test_float16_costs_a_few_roundings(graph: onnx.ModelProto) -> None:
    """Frames and state; that they differ at all shows that the roundings were held."""
    found = errors(ran(hold_roundings(to_half(graph))), ran(graph))
    assert set(found) == {"vertices", "kv_cache_out", "latents_out"}
    assert max(found.values()) <= TOLERANCE
    assert min(found.values()) > 0


def test_the_boundary_is_unchanged(graph: onnx.ModelProto) -> None:
    before = onnx.ModelProto.FromString(graph.SerializeToString())
    after = to_half(graph)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert graph == before


def test_normalisations_softmax_and_sums_are_float32(graph: onnx.ModelProto) -> None:
    model = to_half(graph)
    known = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.output, *known.input)}
    wanted = ("LayerNormalization", "InstanceNormalization", "Softmax", "ReduceSum", "Erf", "Sigmoid")
    found = [node for node in model.graph.node if node.op_type in wanted]
    assert found
    assert {kinds[node.output[0]] for node in found} == {TensorProto.FLOAT}


def test_parts_are_all_of_the_graph(graph: onnx.ModelProto) -> None:
    made = parts(graph.graph)
    assert set(made) == set(PARTS)
    outputs = [name for node in graph.graph.node for name in node.output]
    assert sorted(name for names in made.values() for name in names) == sorted(outputs)
    prefixes = {
        ENCODER: ("encoder", "predictor.cross"),
        PREDICTOR: ("predictor", "head"),
        DECODER: ("decoder",),
    }
    for part, names in made.items():
        weights = {
            name for name in weights_of(graph, TensorProto.FLOAT, names) if not name.startswith("val_")
        }
        own = {name for name in weights if name.endswith("weight")}
        assert own
        assert all(name.startswith(prefixes[part]) for name in own)


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_is_converted(graph: onnx.ModelProto, part: str) -> None:
    converted = to_half(graph, part)
    tensors = parts(graph.graph)[part]
    makers = {node.output[0].removesuffix("_half") for node in converted.graph.node}
    assert tensors & makers
    kinds = {t.name for t in converted.graph.initializer if t.data_type == TensorProto.FLOAT16}
    for node in converted.graph.node:
        if node.op_type in half.PRODUCTS and kinds.intersection(node.input):
            assert node.output[0] in tensors or node.output[0].rpartition("_")[0] in tensors
    found = errors(ran(hold_roundings(converted)), ran(graph))
    assert max(found.values()) <= TOLERANCE
    assert found["vertices"] > 0
    assert (found["latents_out"] > 0) == (part != DECODER)


@pytest.mark.parametrize("part", PARTS)
def test_the_coarsest_part_is_named(part: str) -> None:
    """A bias far from zero leaves few bits for what is added to it."""
    graph = hop_graph("vocaset_small", 4, 2)
    tensors = parts(graph.graph)[part] - islands(graph.graph)
    biased = next(
        n for n in graph.graph.node if n.op_type == "Gemm" and n.output[0] in tensors and len(n.input) > 2
    )
    bias = next(t for t in graph.graph.initializer if t.name == biased.input[2])
    large = helper.make_tensor("large", TensorProto.FLOAT, bias.dims, numpy_helper.to_array(bias) + 2000)
    graph.graph.initializer.append(large)
    biased.input[2] = large.name
    want = ran(graph)
    assert coarsest_part(graph, lambda model: errors(ran(hold_roundings(model)), want)["vertices"]) == part


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("taps", "pads"), [(4, [2, 2]), (34, [16, 17]), (17, [0, 0])])
def test_a_grouped_convolution_is_a_product(taps: int, pads: list[int], biased: bool) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 40])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 9, 41 + sum(pads) - taps])
    weights = np.random.default_rng(1).standard_normal((9, 2, taps)).astype(np.float16).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w", "b"][: 3 if biased else 2], ["y"], group=3, pads=pads)
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(weights[:, 0, 0], "b")]
    model = small(node, x, y, constants[: 2 if biased else 1])
    halved = to_half(model)
    assert "Conv" not in [n.op_type for n in halved.graph.node]
    got, want = ran(halved)["y"], ran(model)["y"]
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def small(node: Any, x: Any, y: Any, weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    """A model of one node."""
    graph = helper.make_graph([node], "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_weights_beyond_float16_stay_float32() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
    for largest, kind in ((60000.0, TensorProto.FLOAT16), (70000.0, TensorProto.FLOAT)):
        weight = numpy_helper.from_array(np.full((2, 2), largest, np.float32), "w")
        model = to_half(small(helper.make_node("MatMul", ["x", "w"], ["y"]), x, y, [weight]))
        assert {t.data_type for t in model.graph.initializer} == {kind}


def test_roundings_are_held() -> None:
    """onnxruntime on a CPU drops casts in pairs; without the hold this test's product would not be rounded."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) / 3, "w")
    model = to_half(small(helper.make_node("MatMul", ["x", "w"], ["y"]), x, y, [weight]))
    values = np.array([[1.0001, 0.333333, 3.14159, 1000.4]], np.float32)
    third = np.float32(np.float16(1 / 3))
    want = (values.astype(np.float16).astype(np.float32) * third).astype(np.float16)

    def run(model: Any) -> Array:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        result: Array = session.run(None, {"x": values})[0]
        return result

    assert np.array_equal(run(hold_roundings(model)), want.astype(np.float32))
    assert not np.array_equal(run(model), want.astype(np.float32))


QUIET = 1e-3
WORSE = 20.0
"""Factor of the error that leaving the islands out must cost at least; measured: 390 for quiet noise, 60 for speech."""


def test_islands_earn_their_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power spectrum of quiet audio lies below float16's range."""
    graph = hop_graph("bundled", 1, 1)
    want = ran(graph, level=QUIET)

    def error() -> float:
        return errors(ran(hold_roundings(to_half(graph)), level=QUIET), want)["kv_cache_out"]

    with_islands = error()
    monkeypatch.setattr(half, "STATISTICS", frozenset())
    # Negated: a spectrum that overflows gives NaN.
    assert not error() <= WORSE * with_islands


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, exported with float16 graphs."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "config.yaml").write_text(TINY, encoding="utf-8")
    arguments = ["--config", str(folder / "config.yaml"), "--random-weights", "0", "--precision", "fp16"]
    assert main([*arguments, "--out", str(folder / "model")]) == 0
    return folder / "model"


def test_an_export_holds_float16_to_its_bound(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    for operators in ("onnx", "onnxruntime"):
        key = graph_key("hop", "fp16", operators)
        assert manifest.graphs[key].operators == operators
        lines = {line.measure: line for line in manifest.parity if line.graph == key}
        for measure in ("vertex_error_p99_mm", "vertex_error_max_mm"):
            line = lines[measure]
            assert line.bound is not None
            assert 0 < line.value <= line.bound


@pytest.mark.parametrize(
    ("shares", "taken"), [([0.4], 0), ([0.9, np.inf, 0.5], 2), ([0.9, 0.8, 0.6, 0.7], 2)]
)
def test_a_probe_that_float16_does_not_follow_gives_way_to_the_next(
    shares: list[float], taken: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, found = read_manifest(tiny), iter(shares)
    monkeypatch.setattr(probe, "_share", lambda *_: next(found))
    talker = Talker.load(tiny, "onnxruntime-cpu")
    made = probe.make_probe(tiny, manifest, talker, ["hop.fp16"], 1.0)
    drawn = Excerpt.make(manifest, len(made["noise"]), read_identity(tiny, manifest), speech=True, seed=taken)
    np.testing.assert_array_equal(made["noise"], drawn.noise)
    assert not list(found)
    assert len(shares) <= probe.DRAWS

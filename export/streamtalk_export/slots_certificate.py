"""Graphs of many slots against those of one, which the certificate is about: what holds for one voice holds for each.

Certifying all slots over a long stream would take as many times longer as there are slots. Instead every slot is given
another moment of one voice's stream, so that a slot that reads its neighbour's row, or the first one's, is found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamtalk.manifest import AUDIO_ENCODER, FRAME, Manifest, Parity, Precision, graph_key
from streamtalk_export.certificate import FEATURE_BOUND, STAGE_BOUND, MaxError
from streamtalk_export.drive import Array, Graphs, Probe, Stream, frame_inputs
from streamtalk_export.eight_bit import GRAPHS as INT8_GRAPHS
from streamtalk_export.reduced_certificate import BOUNDS

MOMENTS = 3
"""Of the stream: its first frame, one as the windows fill, one when both are full."""
OUTPUTS = ("vertices", "kv_cache_out", "latents_out")


@dataclass(frozen=True)
class Moment:
    """A frame of one voice's stream: its hop's window and its place there, what the frame graph of one is given, and
    what that makes of it."""

    window: Array
    place: int
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def moments(directory: Path, manifest: Manifest, identity: dict[str, Array]) -> list[Moment]:
    """Three of a stream through the float32 graphs of one voice."""
    last = max(manifest.history, manifest.decode_window)
    wanted = {last * n // (MOMENTS - 1) for n in range(MOMENTS)}
    probe = Probe.make(manifest, (last + 1) / manifest.fps, identity)
    graphs, stream = Graphs(directory, manifest), Stream(manifest, probe.start_latent)
    found = []
    for window in probe.windows(manifest):
        (features,) = graphs.run(AUDIO_ENCODER, pcm=window)
        for place, feature in enumerate(features[: len(probe.noise) - stream.frame]):
            inputs = frame_inputs(stream, feature, probe)
            outputs = dict(zip(OUTPUTS, graphs.run(FRAME, **inputs), strict=True))
            if stream.frame in wanted:
                found.append(Moment(window, place, inputs, outputs))
            stream.cache, stream.latents = outputs["kv_cache_out"], outputs["latents_out"]
            stream.frame += 1
    return found


def certify_slots(
    directory: Path,
    manifest: Manifest,
    found: Sequence[Moment],
    precisions: Sequence[Precision],
    rms_motion_mm: float,
) -> list[Parity]:
    """Every slot of the graphs in `directory` at one of the moments `found`, by turns, at float32 and `precisions`. The
    caller enforces.
    """
    seats = [found[slot % len(found)] for slot in range(manifest.batch)]
    inputs = {name: np.stack([seat.inputs[name] for seat in seats]) for name in seats[0].inputs}
    wanted = {name: np.stack([seat.outputs[name] for seat in seats]) for name in OUTPUTS}
    windows = np.stack([seat.window for seat in seats])
    exact = inputs["audio_feature"]
    graphs = Graphs(directory, manifest)
    heard = _features(graphs, manifest, windows, seats)
    graphs.close(AUDIO_ENCODER)
    frame = graphs.run_slots(FRAME, inputs)
    asleep = graphs.run_slots(FRAME, inputs | {"active": np.zeros(manifest.batch, np.bool_)})
    graphs.close(FRAME)
    lines = [
        _line(AUDIO_ENCODER, "slots_max_abs_error", FEATURE_BOUND, (heard, exact)),
        _line(FRAME, "slots_max_abs_error", STAGE_BOUND, *zip(frame, wanted.values(), strict=True)),
        _line(
            FRAME,
            "slots_change_of_state_where_not_active",
            0.0,
            (asleep[1], inputs["kv_cache"]),
            (asleep[2], inputs["latents"]),
        ),
        *_stages(graphs, inputs, wanted),
    ]
    for precision in precisions:
        reduced = Graphs(directory, manifest, precision)
        feature = exact
        if precision != "int8" or AUDIO_ENCODER in INT8_GRAPHS:
            feature = _features(reduced, manifest, windows, seats)
        vertices = reduced.run_slots(FRAME, inputs | {"audio_feature": feature})[0]
        off = np.linalg.norm(vertices.astype(np.float64) - wanted["vertices"], axis=-1).max()
        lines.append(
            Parity(
                subject=graph_key(FRAME, precision),
                quantity="slots_vertex_error_max_mm",
                frames=len(seats),
                measured=1000 * manifest.metres_per_unit * float(off),
                bound=BOUNDS[precision].limits_mm(rms_motion_mm).max,
            )
        )
    return lines


def _features(graphs: Graphs, manifest: Manifest, windows: Array, seats: Sequence[Moment]) -> Array:
    """The row of audio features [B, A] of every slot's frame, in as many runs of the encoder as that takes."""
    size = manifest.encoder_batch
    rows = []
    for first in range(0, len(windows), size):
        # The last run hears the last windows, some of them for the second time.
        start = min(first, len(windows) - size)
        features = graphs.run_slots(AUDIO_ENCODER, {"pcm": windows[start : start + size]})[0]
        rows.append(features[first - start :])
    every = np.concatenate(rows)
    return np.stack([features[seat.place] for features, seat in zip(every, seats, strict=True)])


def _stages(graphs: Graphs, inputs: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[Parity]:
    """The three graphs that make up a frame, one after the other."""

    def run(name: str, given: dict[str, Array]) -> list[Array]:
        outputs = graphs.run_slots(name, given)
        graphs.close(name)
        return outputs

    condition, kv_cache = run(
        "condition_predictor",
        {name: inputs[name] for name in ("audio_feature", "style", "position", "kv_cache", "valid_frames")}
        | {"previous_latent": inputs["latents"][:, -1]},
    )
    (latent,) = run("diffusion_head", {"noise": inputs["noise"], "condition": condition})
    (vertices,) = run(
        "vq_decoder",
        {
            "latents": wanted["latents_out"],
            "valid_latents": np.minimum(inputs["valid_latents"] + 1, inputs["latents"].shape[1]),
            "template": inputs["template"],
        },
    )
    pairs = {
        "condition_predictor": (kv_cache, wanted["kv_cache_out"]),
        "diffusion_head": (latent, wanted["latents_out"][:, -1]),
        "vq_decoder": (vertices, wanted["vertices"]),
    }
    return [_line(name, "slots_max_abs_error", STAGE_BOUND, pair) for name, pair in pairs.items()]


def _line(subject: str, quantity: str, bound: float, *pairs: tuple[Array, Array]) -> Parity:
    """Of the certificate, for pairs of what every slot gave and what it should have given."""
    error = MaxError()
    for got, want in pairs:
        error.add(got, want)
    error.count = len(pairs[0][0])
    return error.line(subject, quantity, bound)

"""Graphs of many slots against those of one, which the certificate is about: what holds for one voice holds for each.

Certifying all slots over a long stream would take as many times longer as there are slots. Instead neighbours are
given other moments of a stream, other styles and faces, and only every second one is active, so that a slot that reads
another's row is found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamtalk.manifest import AUDIO_ENCODER, FRAME, Manifest, Parity, Precision, graph_key
from streamtalk_export.certificate import FEATURE_BOUND, STAGE_BOUND, MaxError, parity_line
from streamtalk_export.drive import Array, Graphs, Probe, Stream, frame_inputs, next_frame
from streamtalk_export.reduced_certificate import BOUNDS, vertex_distance

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
    """Three of a stream through the float32 graphs of one voice, each as another speaker where there are several, and
    with its face elsewhere."""
    last = max(manifest.history, manifest.decode_window)
    wanted = {last * n // (MOMENTS - 1) for n in range(MOMENTS)}
    probe = Probe.make(manifest, (last + 1) / manifest.fps, identity)
    graphs, stream = Graphs(directory, manifest), Stream(manifest, probe.start_latent)
    found: list[Moment] = []
    for window in probe.windows(manifest):
        (features,) = graphs.run(AUDIO_ENCODER, pcm=window)
        for place, feature in enumerate(features[: len(probe.noise) - stream.frame]):
            if stream.frame in wanted:
                n = len(found)
                inputs = frame_inputs(stream, feature, probe) | {
                    "style": identity["styles"][n % len(identity["styles"])],
                    "template": probe.template + np.float32(0.1 * n),
                }
                outputs = zip(OUTPUTS, graphs.run(FRAME, **inputs), strict=True)
                found.append(Moment(window, place, inputs, dict(outputs)))
            next_frame(graphs, stream, feature, probe)
    return found


def certify_slots(
    directory: Path,
    manifest: Manifest,
    found: Sequence[Moment],
    precisions: Sequence[Precision],
    certified: Sequence[Parity],
) -> list[Parity]:
    """Every slot of the graphs in `directory` at one of the moments `found`, by turns, at float32 and `precisions`. The
    largest error of those is bounded as one voice's was in the lines `certified`. The caller enforces.
    """
    largest_mm = {line.subject: line.bound for line in certified if line.quantity == "vertex_error_max_mm"}
    graphs, batch = Graphs(directory, manifest), manifest.batch
    rounds = [_Seats.of(found, batch, turn) for turn in range(len(found))]
    heard, exact = _features(graphs, manifest, rounds[0]), rounds[0].inputs["audio_feature"]
    graphs.close(AUDIO_ENCODER)
    lines = [
        _line(batch, AUDIO_ENCODER, "slots_max_abs_error", FEATURE_BOUND, (heard, exact)),
        *_frames(graphs, batch, rounds),
        *_stages(graphs, batch, rounds[0]),
    ]
    for precision in precisions:
        bound_mm = largest_mm[graph_key(FRAME, precision)]
        lines += _reduced(directory, manifest, precision, rounds[0], bound_mm)
    return lines


@dataclass(frozen=True)
class _Seats:
    """A moment for every slot: what the frame graph of all is given, and should give where a slot is `active`."""

    moments: Sequence[Moment]
    inputs: Mapping[str, Array]
    wanted: Mapping[str, Array]
    active: Array

    @classmethod
    def of(cls, found: Sequence[Moment], batch: int, turn: int) -> _Seats:
        """Neighbours at different moments, and every second slot active: the others in the next turn."""
        seats = [found[(slot + turn) % len(found)] for slot in range(batch)]
        return cls(
            moments=seats,
            inputs={name: np.stack([seat.inputs[name] for seat in seats]) for name in seats[0].inputs},
            wanted={name: np.stack([seat.outputs[name] for seat in seats]) for name in OUTPUTS},
            active=np.arange(batch) % 2 == turn % 2,
        )


def _frames(graphs: Graphs, batch: int, rounds: Sequence[_Seats]) -> list[Parity]:
    """The frame graph, some of its slots active and some not."""
    vertices, state, kept = [], [], []
    for seats in rounds:
        on, given, wanted = seats.active, seats.inputs, seats.wanted
        got = dict(zip(OUTPUTS, graphs.run_slots(FRAME, {**given, "active": on}), strict=True))
        vertices.append((got["vertices"][on], wanted["vertices"][on]))
        for before, after in (("kv_cache", "kv_cache_out"), ("latents", "latents_out")):
            state.append((got[after][on], wanted[after][on]))
            kept.append((got[after][~on], given[before][~on]))
    graphs.close(FRAME)
    return [
        _line(batch, FRAME, "slots_max_abs_error", STAGE_BOUND, *vertices),
        _line(batch, FRAME, "slots_max_abs_error_of_state", STAGE_BOUND, *state),
        _line(batch, FRAME, "slots_change_of_state_where_not_active", 0.0, *kept),
    ]


def _reduced(
    directory: Path, manifest: Manifest, precision: Precision, seats: _Seats, bound_mm: float | None
) -> list[Parity]:
    """Frames of fewer bits, from float32's state: vertices within the largest error that is allowed, the new state
    within the same share of its own peak."""
    graphs = Graphs(directory, manifest, precision)
    feature = _features(graphs, manifest, seats)
    graphs.close(AUDIO_ENCODER)
    got = dict(zip(OUTPUTS, graphs.run_slots(FRAME, {**seats.inputs, "audio_feature": feature}), strict=True))
    off = float(vertex_distance(got["vertices"], seats.wanted["vertices"]).max())
    subject = graph_key(FRAME, precision)
    return [
        Parity(
            subject=subject,
            quantity="slots_vertex_error_max_mm",
            frames=manifest.batch,
            measured=1000 * manifest.metres_per_unit * off,
            bound=bound_mm,
        ),
        _line(
            manifest.batch,
            subject,
            "slots_max_abs_error_of_state",
            BOUNDS[precision].max_of_motion,
            *((got[name], seats.wanted[name]) for name in OUTPUTS[1:]),
        ),
    ]


def _features(graphs: Graphs, manifest: Manifest, seats: _Seats) -> Array:
    """The row of audio features [B, A] of every slot's frame, in as many runs of the encoder as that takes."""
    size, windows = manifest.encoder_batch, np.stack([moment.window for moment in seats.moments])
    rows = []
    for first in range(0, len(windows), size):
        # The last run hears the last windows, some of them for the second time.
        start = min(first, len(windows) - size)
        features = graphs.run_slots(AUDIO_ENCODER, {"pcm": windows[start : start + size]})[0]
        rows.append(features[first - start :])
    every = np.concatenate(rows)
    return np.stack([heard[moment.place] for heard, moment in zip(every, seats.moments, strict=True)])


def _stages(graphs: Graphs, batch: int, seats: _Seats) -> list[Parity]:
    """The three graphs that make up a frame, one after the other."""
    inputs, wanted = seats.inputs, seats.wanted

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
    return [_line(batch, name, "slots_max_abs_error", STAGE_BOUND, pair) for name, pair in pairs.items()]


def _line(batch: int, subject: str, quantity: str, bound: float, *pairs: tuple[Array, Array]) -> Parity:
    """Of the certificate, for pairs of what the slots gave and what they should have given."""
    error = MaxError()
    for got, want in pairs:
        error.add(got, want)
    return parity_line(subject, quantity, batch, error.error, error.peak, bound)

"""The inputs and outputs that the two graphs of the run time must have, derived from the manifest's sizes."""

from __future__ import annotations

from streamtalk.errors import ModelError
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Graph, Manifest, Tensor

Tensors = dict[str, Tensor]


def expected(manifest: Manifest) -> dict[str, tuple[Tensors, Tensors]]:
    """Inputs and outputs by graph and name."""
    m = manifest
    B, A, C, E = m.batch, m.audio_width, m.latent_width, m.condition_width
    kv_cache = (B, m.layers, 2, m.heads, m.history, E // m.heads)
    latents = (B, m.decode_window, C)
    return {
        AUDIO_ENCODER: (
            _tensors(("pcm", "float32", (m.encoder_batch, m.window_samples))),
            _tensors(("audio_features", "float32", (m.encoder_batch, m.hop, A))),
        ),
        FRAME: (
            _tensors(
                ("audio_feature", "float32", (B, A)),
                ("noise", "float32", (B, C)),
                ("style", "float32", (B, E)),
                ("position", "int64", (B,)),
                ("valid_frames", "int64", (B,)),
                ("valid_latents", "int64", (B,)),
                ("template", "float32", (B, 3 * m.n_vertices)),
                ("kv_cache", "float32", kv_cache),
                ("latents", "float32", latents),
                ("active", "bool", (B,)),
            ),
            _tensors(
                ("vertices", "float32", (B, m.n_vertices, 3)),
                ("kv_cache_out", "float32", kv_cache),
                ("latents_out", "float32", latents),
            ),
        ),
    }


def check_manifest(manifest: Manifest) -> None:
    """Compare the graphs that the manifest declares with its own sizes. Raises ModelError."""
    for name, (inputs, outputs) in expected(manifest).items():
        graph = manifest.graphs.get(name)
        if graph is None:
            raise ModelError(
                f"The manifest has no graph `{name}`; it lists {sorted(manifest.graphs)}. Export again."
            )
        compare(f"The manifest's `{name}` inputs", inputs, _by_name(graph.inputs))
        compare(f"The manifest's `{name}` outputs", outputs, _by_name(graph.outputs))


def compare(subject: str, want: Tensors, got: Tensors) -> None:
    """Raise ModelError unless names, dtypes and shapes agree."""
    if want.keys() != got.keys():
        raise ModelError(
            f"{subject} are {sorted(got)}; expected {sorted(want)}. Export again with this version."
        )
    for name, tensor in want.items():
        if tensor != got[name]:
            raise ModelError(
                f"{subject}: `{name}` is {_text(got[name])}; expected {_text(tensor)}. "
                "Export again with this version."
            )


def declared(graph: Graph) -> tuple[Tensors, Tensors]:
    """The inputs and outputs that the manifest declares for a graph."""
    return _by_name(graph.inputs), _by_name(graph.outputs)


def _by_name(tensors: tuple[Tensor, ...]) -> Tensors:
    return {tensor.name: tensor for tensor in tensors}


def _tensors(*rows: tuple[str, str, tuple[int, ...]]) -> Tensors:
    return {name: Tensor(name, dtype, shape) for name, dtype, shape in rows}  # type: ignore[arg-type]


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"

"""Neutral faces and meshes from files: arrays, archives, meshes, and the datasets' pickles read safely."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.model import LANDMARKS
from streamtalk_export.blendshapes import arkit_shapes
from streamtalk_export.errors import ExportError

Float32 = npt.NDArray[np.float32]

# All that numpy needs to rebuild an array, under the names of old and new versions.
_ARRAY_GLOBALS = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_GLOBALS:
            return super().find_class(module, name)
        raise ExportError(f"The pickle asks for {module}.{name}; only numpy arrays are admitted.")


@dataclass(frozen=True)
class Templates:
    """Neutral vertices [n, V, 3] float32 and their names, empty where the file has none."""

    vertices: Float32
    names: tuple[str, ...]


def read_pickle(path: Path) -> dict[str, Any]:
    """What a pickle of numpy arrays holds, by name ("" for what is no dict). Raises ExportError."""
    try:
        with path.open("rb") as file:
            # latin1: the datasets' pickles were written by Python 2.
            content = _ArraysOnly(file, encoding="latin1").load()
    except ExportError as error:
        raise ExportError(f"{path} was refused. {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise ExportError(f"{path} is not a readable pickle: {error}") from error
    return content if isinstance(content, dict) else {"": content}


def _read_mesh(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Vertices [V, 3] and faces [F, 3] of an .obj, .ply or other mesh file, in the file's order."""
    import trimesh

    try:
        mesh: Any = trimesh.load(path, process=False, maintain_order=True, force="mesh")
        return np.asarray(mesh.vertices), np.asarray(mesh.faces)
    except Exception as error:  # trimesh and its readers raise many kinds, ImportError among them
        raise ExportError(f"{path} is not a readable mesh: {error}") from error


def _read_arrays(path: Path) -> dict[str, Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"{path} is not a readable numpy file: {error}") from error


def read_templates(path: Path, n_vertices: int, n_speakers: int, speakers: Sequence[str]) -> Templates:
    """Neutral faces from .npy, .npz, .pkl (name to [V, 3]) or a mesh. Raises ExportError.

    Where the file names its faces and all `speakers` are among them, theirs are taken, in that order; so
    are all of a file that names exactly `n_speakers`. An archive's `templates` or `template` come first.
    """
    if not path.is_file():
        raise ExportError(f"No template at {path}.")
    if path.suffix in (".npy", ".npz"):
        content = _read_arrays(path)
    elif path.suffix in (".pkl", ".pickle"):
        content = read_pickle(path)
    else:
        content = {"": _read_mesh(path)[0]}
    if "templates" in content:
        names = tuple(str(name) for name in content.get("speaker_names", ()))
        return Templates(_shaped(content["templates"], n_vertices, path), names)
    if speakers and set(speakers) <= content.keys():
        stacked = np.concatenate([_shaped(content[name], n_vertices, path) for name in speakers])
        return Templates(stacked, tuple(speakers))
    if "template" in content:
        return Templates(_shaped(content["template"], n_vertices, path), ())
    if len(content) == 1:
        return Templates(_shaped(next(iter(content.values())), n_vertices, path), ())
    if len(content) == n_speakers:
        stacked = np.concatenate([_shaped(face, n_vertices, path) for face in content.values()])
        return Templates(stacked, tuple(map(str, content)))
    raise ExportError(
        f"{path} holds {len(content)} faces ({', '.join(map(str, list(content)[:6]))} ...); expected one, an "
        f"array `templates`, or those of the speakers ({', '.join(speakers) or 'unnamed'})."
    )


def _shaped(array: Any, n_vertices: int, path: Path) -> Float32:
    try:
        values = np.asarray(array)
    except ValueError as error:
        raise ExportError(f"{path}: a template that is no array: {error}") from error
    if values.dtype.kind not in "fiu" or values.size == 0 or values.size % (3 * n_vertices):
        raise ExportError(
            f"{path}: a template of shape {list(values.shape)} ({values.dtype}); expected {n_vertices} vertices "
            f"of 3 coordinates."
        )
    shaped = values.reshape(-1, n_vertices, 3).astype(np.float32)
    if not np.isfinite(shaped).all():
        raise ExportError(f"{path}: the template holds values that are not finite.")
    return shaped


@dataclass(frozen=True)
class Mesh:
    """What a faces file says of V vertices: triangles `faces` [F, 3], `colors` [V, 3] or [0, 3], vertex numbers by
    the names of `streamtalk.model.LANDMARKS`, ARKit `shapes` [52, V, 3] in Apple's order or None, and the
    speakers' own `identity_colors` [n, V, 3] or None, in the order of their templates.
    """

    faces: npt.NDArray[np.int32]
    colors: npt.NDArray[np.uint8]
    landmarks: Mapping[str, npt.NDArray[np.int32]]
    shapes: Float32 | None
    identity_colors: npt.NDArray[np.uint8] | None = None


def read_faces(path: Path, n_vertices: int) -> Mesh:
    """A mesh from .npz, .npy or a mesh file; all but the faces only an .npz can hold. Raises ExportError."""
    if not path.is_file():
        raise ExportError(f"No faces at {path}.")
    content: dict[str, Any] = {}
    if path.suffix in (".npy", ".npz"):
        content = _read_arrays(path)
        faces = content.get("faces", content.get(""))
    else:
        faces = _read_mesh(path)[1]
    if faces is None:
        raise ExportError(f"{path} has no array `faces`.")
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
        raise ExportError(
            f"{path}: faces of shape {list(faces.shape)} ({faces.dtype}); expected [F, 3] integers."
        )
    if len(faces) and not (faces.min() >= 0 and faces.max() < n_vertices):
        raise ExportError(
            f"{path}: faces index vertices {faces.min()} to {faces.max()}; the model has {n_vertices}."
        )
    none = np.empty((0, 3), np.uint8)
    own = content.get("identity_colors")
    own = None if own is None or own.size == 0 else _colors(own, "identity_colors", n_vertices, path)
    colors = content.get("colors", none if own is None else own[0])
    return Mesh(
        faces.astype(np.int32),
        _colors(colors, "colors", n_vertices, path) if colors.size else none,
        {name: _landmark(content[name], name, n_vertices, path) for name in LANDMARKS if name in content},
        _shapes(content, n_vertices, path) if "blendshapes" in content else None,
        own,
    )


def _colors(values: npt.NDArray[Any], name: str, n_vertices: int, path: Path) -> npt.NDArray[np.uint8]:
    """sRGB colours [V, 3], or [n, V, 3] for `identity_colors`, as uint8."""
    people = ("n",) if name == "identity_colors" else ()
    fits = values.ndim == len(people) + 2 and values.shape[-2:] == (n_vertices, 3)
    if not fits or values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        wanted = ", ".join([*people, str(n_vertices), "3"])
        raise ExportError(
            f"{path}: {name} of shape {list(values.shape)} ({values.dtype}); expected [{wanted}] integers of 0 to 255."
        )
    return values.astype(np.uint8)


def _landmark(values: npt.NDArray[Any], name: str, n_vertices: int, path: Path) -> npt.NDArray[np.int32]:
    if values.dtype.kind not in "iu" or (values.size and not 0 <= values.min() <= values.max() < n_vertices):
        raise ExportError(f"{path}: `{name}` must be numbers of the {n_vertices} vertices.")
    return values.astype(np.int32)


def _shapes(content: dict[str, Any], n_vertices: int, path: Path) -> Float32:
    deltas, names = content["blendshapes"], content.get("blendshape_names")
    if names is None or deltas.shape != (names.size, n_vertices, 3) or deltas.dtype.kind != "f":
        raise ExportError(
            f"{path}: blendshapes of shape {list(deltas.shape)} ({deltas.dtype}); expected "
            f"[n, {n_vertices}, 3] numbers and n `blendshape_names`."
        )
    if not np.isfinite(deltas).all():
        raise ExportError(f"{path}: blendshapes hold values that are not finite.")
    return arkit_shapes([str(name) for name in names.reshape(-1)], deltas, path)

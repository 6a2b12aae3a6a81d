"""How the face is lit, in one place for all renderers.

The lights are far away and the lens is long, so what a point reflects depends on its normal alone. That makes
the whole studio a table over the normal's x and y (a "lit sphere", Sloan et al. 2001): computed here once,
sampled as a texture by the GPU and the live page, and as an array by the software renderer.

    colour = to_srgb(albedo * table[n])

Gloss is tinted by the albedo, which is wrong for varnish and right for hair: dark hair under an untinted
highlight reads as a helmet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TABLE_SIZE = 256
"""Texels a side. Finer than the normals of a 512 pixel head need."""

VIEWER = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Light:
    """A far light. `towards` points at it in camera axes (x right, y up, z to the viewer). Linear colour."""

    towards: tuple[float, float, float]
    color: tuple[float, float, float]
    gloss: float


KEY = Light(towards=(-0.72, 0.55, 0.64), color=(1.44, 1.28, 1.12), gloss=0.30)
FILL = Light(towards=(0.90, 0.05, 0.45), color=(0.21, 0.26, 0.34), gloss=0.10)
RIM = Light(towards=(0.90, 0.35, -0.45), color=(1.8, 1.9, 2.1), gloss=0.0)
SKY = (0.15, 0.17, 0.21)
GROUND = (0.12, 0.09, 0.07)

WRAP = (0.30, 0.16, 0.12)
"""How far light creeps round the terminator by channel. Red furthest, as it does in skin."""

GLOSS_EXPONENT = 30.0
"""Blinn-Phong. Skin is broad and soft."""

RIM_WIDTH = 3.3
"""Exponent of the edge falloff: higher is thinner."""

BACK_FACE = 0.25
"""Albedo of a triangle seen from behind: the inside of an open mesh reads as shadow."""

POINT_SHARE = 1 / 170
"""Size of a drawn point, of a mesh without faces, as a share of the picture's height."""

BACKDROP_TOP = (64, 70, 80)
BACKDROP_BOTTOM = (30, 33, 39)
BACKDROP_GLOW = (34, 36, 38)
"""sRGB: the wall behind the head from top to bottom, and the soft spot of light added in its middle."""


def light_table(size: int = TABLE_SIZE) -> NDArray[np.float32]:
    """The studio's light for every normal that faces the viewer: [size, size, 3] float32, linear.

    Row j, column i holds n.y = 1 - 2 j / (size - 1), n.x = 2 i / (size - 1) - 1.
    """
    axis = np.linspace(-1, 1, size)
    n = np.stack(np.broadcast_arrays(axis[None, :], -axis[:, None], 0.0), axis=-1)
    radius = np.linalg.norm(n, axis=-1, keepdims=True)
    n /= np.maximum(radius, 1)  # beyond the silhouette: its own light, so that filtering does not bleed
    n[..., 2] = np.sqrt(np.maximum(1 - np.minimum(radius, 1) ** 2, 0))[..., 0]

    up = n[..., 1:2] * 0.5 + 0.5
    light = np.array(GROUND) * (1 - up) + np.array(SKY) * up
    wrap = np.array(WRAP)
    for lamp in (KEY, FILL):
        towards = _unit(lamp.towards)
        facing = n @ towards
        # Wrapped diffuse that keeps its energy (d'Eon and Luebke, GPU Gems 3, 14.4).
        diffuse = np.clip((facing[..., None] + wrap) / (1 + wrap) ** 2, 0, None)
        half = _unit(towards + VIEWER)
        gloss = lamp.gloss * np.clip(n @ half, 0, None) ** GLOSS_EXPONENT * np.clip(facing, 0, 1)
        light += np.array(lamp.color) * (diffuse + gloss[..., None])
    edge = (1 - n[..., 2]) ** RIM_WIDTH * np.clip(n @ _unit(RIM.towards), 0, None)
    light += np.array(RIM.color) * edge[..., None]
    return light.astype(np.float32)


def backdrop(size: tuple[int, int]) -> NDArray[np.uint8]:
    """The wall behind the head: [height, width, 3] uint8 sRGB."""
    width, height = size
    y = np.linspace(0, 1, height)[:, None, None]
    x = (np.arange(width)[None, :, None] - width / 2) / height
    wall = np.array(BACKDROP_TOP) * (1 - y) + np.array(BACKDROP_BOTTOM) * y
    glow = np.exp(-(x**2 + (y - 0.45) ** 2) / 0.12)
    shade = wall + np.array(BACKDROP_GLOW) * glow
    # A fixed dither of under one level: a slow gradient in 8 bits shows rings otherwise.
    noise = np.random.default_rng(0).random((height, width, 1)) - 0.5
    wall_srgb: NDArray[np.uint8] = np.clip(np.rint(shade + noise), 0, 255).astype(np.uint8)
    return wall_srgb


def to_linear(colors: NDArray[np.uint8]) -> NDArray[np.float32]:
    """sRGB uint8 to linear float32 in 0..1 (IEC 61966-2-1)."""
    c = colors.astype(np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


def to_srgb(linear: NDArray[np.floating]) -> NDArray[np.float64]:
    """Linear to sRGB 0..1 as a display takes it (IEC 61966-2-1), clipped."""
    c = np.clip(linear.astype(np.float64), 0, 1)
    return np.where(c <= 0.0031308, c * 12.92, 1.055 * c ** (1 / 2.4) - 0.055)


def _unit(vector: ArrayLike) -> NDArray[np.float64]:
    array = np.array(vector, np.float64)
    unit: NDArray[np.float64] = array / np.linalg.norm(array)
    return unit

"""Who the bundled talkers are: what each head is mixed from, and its colours and hair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """Colours of one identity, sRGB 0..255."""

    skin: Colour
    blush: Colour
    lip: Colour
    hair: Colour
    brow: Colour
    iris: Colour


@dataclass(frozen=True)
class Haircut:
    """How hair falls from its parting. Decimetres and degrees."""

    part_deg: float  # where the parting meets the forehead, round from the face to the left
    top: float  # thickness over the scalp beside the parting
    sides: float  # thickness at the hairline
    hangs: bool  # over the ears down to `tips`; else it ends at the hairline
    tips: float = 0.0  # height of the ends
    clump: float = 0.016  # how far strands stand out from one another
    fade: float = 0.0  # how much skin shows at the edges, 0..1


@dataclass(frozen=True)
class Identity:
    """A recipe: MPFB2 macro targets by their share, detail targets on top, and what cannot be mixed."""

    macros: Mapping[str, float]
    details: Mapping[str, float]
    palette: Palette
    haircut: Haircut
    lashes: float  # length, of the longest


IDENTITIES: dict[str, Identity] = {
    "ada": Identity(
        {"caucasian-female-young": 0.5, "asian-female-young": 0.25, "african-female-young": 0.25},
        {"head/head-oval": 0.3},
        Palette((222, 174, 150), (212, 138, 118), (186, 100, 96), (70, 46, 34), (66, 46, 36), (112, 76, 44)),
        Haircut(part_deg=16, top=0.11, sides=0.10, hangs=True, tips=6.50),
        lashes=1.0,
    ),
    "ben": Identity(
        {"african-male-young": 0.7, "caucasian-male-young": 0.3},
        {"head/head-square": 0.3, "chin/chin-width-incr": 0.3},
        Palette((134, 90, 68), (124, 70, 54), (124, 68, 62), (30, 24, 22), (30, 22, 20), (66, 44, 30)),
        Haircut(part_deg=8, top=0.035, sides=0.008, hangs=False, clump=0.003, fade=0.75),
        lashes=0.5,
    ),
    "cleo": Identity(
        {"asian-female-young": 0.75, "caucasian-female-young": 0.25},
        {"mouth/mouth-lowerlip-volume-incr": 0.3},
        Palette((228, 184, 162), (220, 150, 132), (190, 100, 100), (34, 28, 30), (40, 32, 32), (72, 48, 34)),
        Haircut(part_deg=2, top=0.09, sides=0.09, hangs=True, tips=6.20, clump=0.012),
        lashes=0.9,
    ),
    "dan": Identity(
        {"caucasian-male-young": 0.85, "african-male-young": 0.15},
        {"head/head-round": 0.3, "nose/nose-hump-incr": 0.3, "chin/chin-prominent-incr": 0.4},
        Palette(
            (218, 166, 142), (206, 130, 112), (176, 104, 98), (104, 76, 52), (92, 66, 46), (92, 120, 138)
        ),
        Haircut(part_deg=24, top=0.125, sides=0.03, hangs=False, clump=0.018, fade=0.35),
        lashes=0.5,
    ),
}

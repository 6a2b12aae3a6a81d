"""Phones to mouth controls to ARKit weights.

Each phone pulls each of the ten controls towards its viseme's target with a dominance that decays in time;
what is seen is the dominance-weighted mean (Cohen and Massaro, "Modeling coarticulation in synthetic visual
speech", 1993). Gains that differ between utterances follow the idea of JALI (Edwards et al., 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_training.visemes import BILABIAL, SILENCE, VOWELS, Phone, tables

Floats = NDArray[np.float32]

SHARPNESS = 1.3  # exponent of the decay
PLATEAU = 0.6  # share of a phone's half width over which its dominance is full
RIGHT_DECAY = 1.2  # a phone lets go faster than it prepares
REST_PRIOR = 0.02
NEAR = 0.6  # of `close`, at most, while a vowel sounds
MEETING_S = 0.01  # from there to closed
CONTACT_S = 0.036  # for which lips stay together at least, so that a film of 30 frames a second shows it
HIDDEN_JAW = 0.02  # weight of `jawOpen` below which the jaw hides a closure

ARKIT_INDEX = {name: index for index, name in enumerate(ARKIT_NAMES)}


@dataclass(frozen=True)
class Style:
    """How one utterance is articulated; the defaults are the canonical talker.

    `asymmetry` is the share that the left side moves more than the right; `smile` a constant bias in 0..1.
    """

    jaw_gain: float = 1.0
    lip_gain: float = 1.0
    theta_scale: float = 1.0
    lead_s: float = 0.02
    asymmetry: float = 0.0
    smile: float = 0.0


def mouth_controls(phones: Sequence[Phone], times_s: NDArray[np.float64], style: Style) -> Floats:
    """The ten controls [L, 10] (order of `tables().controls`) at `times_s` [L], in seconds.

    Time outside all phones belongs to silence: callers cover it with `SIL` phones.
    """
    rules = tables()
    if not phones:
        phones = [Phone(float(times_s[0]), float(times_s[-1]), "_", SILENCE)]
    centre_s = np.array([(p.start_s + p.end_s) / 2 for p in phones]) - style.lead_s
    plateau_s = np.array([(p.end_s - p.start_s) / 2 for p in phones]) * PLATEAU
    offset_s = times_s[:, None] - centre_s[None]  # [L, P]
    tau_s = np.maximum(np.abs(offset_s) - plateau_s[None], 0) * np.where(offset_s > 0, RIGHT_DECAY, 1.0)

    controls = np.zeros((len(times_s), len(rules.controls)), np.float32)
    for column, control in enumerate(rules.controls):
        targets = np.array([rules.viseme_targets[p.viseme].get(control, 0.0) for p in phones])
        alphas = np.array([rules.dominance_alpha.get(p.viseme, {}).get(control, 1.0) for p in phones])
        theta = rules.theta_per_s[control] * style.theta_scale
        dominance = alphas * np.exp(-((theta * tau_s) ** SHARPNESS))
        controls[:, column] = (dominance @ targets) / (dominance.sum(axis=1) + REST_PRIOR)
    close = rules.controls.index("close")
    controls[:, close] = np.minimum(controls[:, close], _nearest(phones, times_s, style.lead_s))
    controls[:, rules.controls.index("jaw")] *= style.jaw_gain
    for control in ("round", "funnel", "spread", "upUp", "loDn"):
        controls[:, rules.controls.index(control)] *= style.lip_gain
    return np.clip(controls, 0.0, 1.0).astype(np.float32)


def _nearest(phones: Sequence[Phone], times_s: NDArray[np.float64], lead_s: float) -> NDArray[np.float64]:
    """The most [L] that lips may be closed at `times_s` [L]: a vowel sounds through open lips.

    Dominance alone has them shut 35 ms before the vowel ahead of a /p b m/ ends. They come near that early,
    but meet when the sound stops, or sooner where the phone is too short to show a closure.
    """
    most = np.ones(len(times_s))
    vowel_s = 0.0  # where the vowels that sound now began
    for before, phone in pairwise([Phone(0.0, 0.0, "_", SILENCE), *phones]):
        if phone.viseme in VOWELS and before.viseme not in VOWELS:
            vowel_s = phone.start_s
        if phone.viseme == BILABIAL and before.viseme in VOWELS:
            meet_s = min(phone.start_s, phone.end_s - lead_s - CONTACT_S)
            sounding = (times_s >= vowel_s) & (times_s < meet_s)
            most[sounding] = NEAR + (1 - NEAR) * np.maximum(1 - (meet_s - times_s[sounding]) / MEETING_S, 0)
    return most


def arkit_weights(controls: Floats, style: Style) -> Floats:
    """ARKit weights [L, 52] (order of `ARKIT_NAMES`) of mouth controls [L, 10].

    `mouthClose` equal to `jawOpen` seals the lips, so a closure holds at any jaw height.
    """
    control = {name: controls[:, column] for column, name in enumerate(tables().controls)}
    close = np.minimum(control["close"], 1.0)
    left, right = 1.0 + style.asymmetry, 1.0 - style.asymmetry
    weights = np.zeros((len(controls), len(ARKIT_NAMES)), np.float32)

    def put(name: str, values: Floats) -> None:
        weights[:, ARKIT_INDEX[name]] = values

    def put_pair(name: str, values: Floats) -> None:
        put(name + "Left", values * np.float32(left))
        put(name + "Right", values * np.float32(right))

    put("jawOpen", control["jaw"])
    put("mouthClose", close * control["jaw"])
    put_pair("mouthPress", control["press"])
    put_pair("mouthStretch", 0.7 * control["spread"])
    put_pair("mouthSmile", 0.25 * control["spread"] + np.float32(style.smile))
    put_pair("mouthUpperUp", control["upUp"] * (1 - close))
    put_pair("mouthLowerDown", control["loDn"] * (1 - close))
    put("mouthPucker", control["round"])
    put("mouthFunnel", control["funnel"] * (1 - close))
    put("mouthRollLower", 0.8 * control["fv"] + 0.2 * control["press"])
    put("mouthRollUpper", 0.15 * control["press"])
    put("mouthShrugLower", 0.25 * control["fv"])
    put("tongueOut", 0.5 * control["tongue"])
    return np.clip(weights, 0.0, 1.0).astype(np.float32)


def controls_from_weights(weights: Floats) -> Floats:
    """The ten controls [L, 10] that ARKit weights [L, 52] stand for: the inverse of `arkit_weights`.

    A closure cannot be seen while the jaw is shut, so `close` is damped there; the same reading is meant for
    labels and predictions alike.
    """

    def get(name: str) -> Floats:
        return np.asarray(weights[:, ARKIT_INDEX[name]], np.float32)

    def get_pair(name: str) -> Floats:
        return np.asarray((get(name + "Left") + get(name + "Right")) / 2, np.float32)

    jaw = get("jawOpen")
    close = np.clip(get("mouthClose") / np.maximum(jaw, np.float32(HIDDEN_JAW)), 0.0, 1.0)
    press = get_pair("mouthPress")
    columns = {
        "jaw": jaw,
        "close": close,
        "press": press,
        "round": get("mouthPucker"),
        "funnel": get("mouthFunnel"),
        "spread": get_pair("mouthStretch") / 0.7,
        "upUp": get_pair("mouthUpperUp"),
        "loDn": get_pair("mouthLowerDown"),
        "fv": (get("mouthRollLower") - 0.2 * press) / 0.8,
        "tongue": 2 * get("tongueOut"),
    }
    return np.stack([columns[name] for name in tables().controls], axis=1).astype(np.float32)

"""Speech with exact phone times from espeak-ng, through the PyPI wheel `espeakng-loader`.

espeak-ng is GPL-3 and serves as a data-making tool only: nothing of it ships with a trained model.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from streamtalk_training.visemes import Phone, espeak_phones

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS = 1
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_CHARACTERS_UTF8 = 1
_VOICELESS_STOPS = frozenset({"p", "t", "t2", "t#", "t[", "k", "tS"})
_MOST_BURST_S = 0.03  # of a voiceless stop's label: the rest is breath through an open mouth
_LEAST_CLOSURE_S, _MOST_CLOSURE_S = 0.02, 0.05
_QUIET = 0.01  # share of the peak under which a closure counts as silent


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Utterance:
    """`pcm` float32 [n] in -1..1 at `sample_rate` Hz and the phones heard in it."""

    pcm: NDArray[np.float32]
    sample_rate: int
    phones: tuple[Phone, ...]


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("espeak-ng speech needs `pip install streamtalk[train]`") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _PHONEME_EVENTS)
    if sample_rate <= 0:
        raise OSError(f"espeak_Initialize failed with {sample_rate} (data: {data.decode()})")
    return library, sample_rate


def say(
    text: str, voice: str = "en-us", rate: int = 175, pitch: int = 50, pitch_range: int = 50
) -> Utterance:
    """Speak `text`. `voice` is a language with an optional variant (`en-gb-x-rp`, `en-us+f3`), `rate` words a
    minute, `pitch` and `pitch_range` 0 to 99.

    The noise inside espeak-ng runs on from call to call: the same calls in the same order, in a fresh
    process, give the same samples. Raises ValueError for an unknown voice or a text without speech.
    """
    library, sample_rate = _library()
    chunks: list[NDArray[np.int16]] = []
    labels: list[tuple[int, str]] = []

    def receive(wave: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if wave and count > 0:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        position = 0
        while events[position].type != _EVENT_LIST_TERMINATED:
            if events[position].type == _EVENT_PHONEME:
                labels.append((events[position].sample, events[position].id.string.decode()))
            position += 1
        return 0

    callback = _Callback(receive)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng knows no voice {voice!r}")
    library.espeak_ng_SetRandSeed(1)  # by itself it seeds the breath of its voices by the clock
    library.espeak_SetParameter(_PARAMETER_RATE, rate, 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
    library.espeak_SetParameter(_PARAMETER_RANGE, pitch_range, 0)
    encoded = text.encode() + b"\0"
    library.espeak_Synth(encoded, len(encoded), 0, 1, 0, _CHARACTERS_UTF8, None, None)
    library.espeak_Synchronize()
    if not chunks or not labels:
        raise ValueError(f"no speech came of {text!r}")
    pcm = (np.concatenate(chunks) / 32768.0).astype(np.float32)
    language = voice.partition("+")[0]
    return Utterance(pcm, sample_rate, tuple(_phones(labels, pcm, sample_rate, language)))


def _phones(
    labels: list[tuple[int, str]], pcm: NDArray[np.float32], sample_rate: int, language: str
) -> list[Phone]:
    """Turn event samples into phones.

    espeak-ng labels a voiceless stop from its burst on; its closure is the silence before, which is taken
    from the phone that precedes it. What follows the burst's first 30 ms is breath (labelled as /h/).
    """
    total_s = len(pcm) / sample_rate
    starts_s = [sample / sample_rate for sample, _ in labels] + [total_s]
    ends_s = starts_s[1:]
    names = [name.lstrip("',%=") for _, name in labels]
    breath: dict[int, float] = {}
    for index, name in enumerate(names):
        if name not in _VOICELESS_STOPS:
            continue
        burst_s = starts_s[index]
        closure_s = burst_s - silence_before(pcm, sample_rate, burst_s)
        if index and closure_s > starts_s[index - 1]:
            ends_s[index - 1] = closure_s
        starts_s[index] = max(closure_s, starts_s[index - 1] if index else 0.0)
        if ends_s[index] - burst_s > _MOST_BURST_S:
            breath[index] = burst_s + _MOST_BURST_S
    phones: list[Phone] = []
    for index, name in enumerate(names):
        end_s = breath.get(index, ends_s[index])
        phones += espeak_phones(name, starts_s[index], end_s, language)
        if index in breath:
            phones += espeak_phones("h", end_s, ends_s[index])
    return [phone for phone in phones if phone.end_s > phone.start_s]


def silence_before(pcm: NDArray[np.float32], sample_rate: int, time_s: float) -> float:
    """Seconds of silence that end at `time_s`, kept within 20 to 50 ms."""
    most = round(_MOST_CLOSURE_S * sample_rate)
    end = round(time_s * sample_rate)
    before = np.abs(pcm[max(end - most, 0) : end])
    loud = np.flatnonzero(before > _QUIET * float(np.abs(pcm).max()))
    quiet = len(before) if len(loud) == 0 else len(before) - 1 - int(loud[-1])
    return float(np.clip(quiet / sample_rate, min(_LEAST_CLOSURE_S, time_s), _MOST_CLOSURE_S))

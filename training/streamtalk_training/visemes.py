"""Phones, as speech engines name them, and the 23 visemes that they stand for.

The tables live in `visemes.json` (the project's own data): targets and dominances of each viseme over the
ten mouth controls, and the phone sets of espeak-ng (English and foreign), of CMU (flite, festival,
pocketsphinx) and of festival's other languages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

SILENCE = "SIL"
BILABIAL = "PBM"
LABIODENTAL = "FV"
VOWELS = frozenset({"AA", "AE", "AH", "AO", "EH", "IY", "IH", "UW", "UH", "OW", "ER"})
DIPHTHONG_SPLIT = 0.45  # share of the phone that its first vowel takes


class UnknownPhoneError(KeyError):
    """An engine's phone that `visemes.json` does not know: what says it cannot be articulated."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument: a sentence in quotation marks.
        return str(self.args[0])


@dataclass(frozen=True)
class Phone:
    """One viseme's stretch of speech: `start_s` to `end_s` in seconds, `name` as the engine spells it."""

    start_s: float
    end_s: float
    name: str
    viseme: str


@dataclass(frozen=True)
class Tables:
    """The content of `visemes.json`; `theta_per_s` is the decay of each control's dominance."""

    controls: tuple[str, ...]
    viseme_targets: Mapping[str, Mapping[str, float]]
    dominance_alpha: Mapping[str, Mapping[str, float]]
    theta_per_s: Mapping[str, float]
    espeak_phones: Mapping[str, str]
    diphthongs: Mapping[str, Sequence[str]]
    cmu_phones: Mapping[str, str]
    cmu_diphthongs: Mapping[str, Sequence[str]]
    foreign_phones: Mapping[str, Mapping[str, str | Sequence[str]]]  # by language; `*` is all but English
    festival_phones: Mapping[str, Mapping[str, str]]  # by language, without marks of stress and length


@cache
def tables() -> Tables:
    content = json.loads(files(__package__).joinpath("visemes.json").read_text(encoding="utf-8"))
    content.pop("notes")
    return Tables(**{**content, "controls": tuple(content["controls"])})


def espeak_phones(name: str, start_s: float, end_s: float, language: str = "en") -> list[Phone]:
    """The phones (two for a diphthong, none for a mark) of one espeak-ng phoneme event.

    Stress marks are stripped. `;` only colours its neighbour, so it yields nothing. One name can stand for
    another sound in another `language` (`y` is rounded in German, not in Polish).
    Raises UnknownPhoneError for a phone that the tables do not know.
    """
    plain = name.lstrip("',%=")
    if plain in ("", ";"):
        return []
    return _phones(plain, start_s, end_s, *_espeak_tables(language))


@cache
def _espeak_tables(language: str) -> tuple[Mapping[str, str], Mapping[str, Sequence[str]]]:
    rules = tables()
    if language == "en" or language.startswith("en-"):
        return rules.espeak_phones, rules.diphthongs
    own = {**rules.foreign_phones["*"], **rules.foreign_phones.get(language, {})}
    singles = {name: viseme for name, viseme in own.items() if isinstance(viseme, str)}
    pairs = {name: visemes for name, visemes in own.items() if not isinstance(visemes, str)}
    return {**rules.espeak_phones, **singles}, {**rules.diphthongs, **pairs}


def cmu_phones(name: str, start_s: float, end_s: float) -> list[Phone]:
    """The phones of one CMU label (`aa`, `ey`, `pau`; stress digits and case do not matter).

    Raises UnknownPhoneError for a phone that the tables do not know.
    """
    plain = name.lower().rstrip("012")
    return _phones(plain, start_s, end_s, tables().cmu_phones, tables().cmu_diphthongs)


def festival_phones(name: str, start_s: float, end_s: float, language: str) -> list[Phone]:
    """The phone of one label of festival's voices of `language` (`it`, `fi`, `cs`); stress (`a1`) and length (`a:`)
    do not matter.

    Raises UnknownPhoneError for a phone that the tables do not know.
    """
    return _phones(name.rstrip("1:"), start_s, end_s, tables().festival_phones[language], {})


def _phones(
    name: str,
    start_s: float,
    end_s: float,
    singles: Mapping[str, str],
    diphthongs: Mapping[str, Sequence[str]],
) -> list[Phone]:
    if name in diphthongs:
        first, second = diphthongs[name]
        middle_s = start_s + DIPHTHONG_SPLIT * (end_s - start_s)
        return [Phone(start_s, middle_s, name, first), Phone(middle_s, end_s, name, second)]
    if name not in singles:
        raise UnknownPhoneError(f"unknown phone {name!r}: add it to visemes.json (known: {sorted(singles)})")
    return [Phone(start_s, end_s, name, singles[name])]

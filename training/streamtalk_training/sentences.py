"""Sentences to speak: WordNet's example sentences, or generated ones where WordNet is not at hand."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

_EXAMPLE = re.compile(r'"([^"]+)"')
_PLAIN = re.compile(r"[A-Za-z][A-Za-z ,.'?!-]+")
_SHORTEST, _LONGEST = 18, 110  # characters
HELD_OUT_SHARE = 40  # one sentence in so many is a test sentence, another one a validation sentence


def wordnet_sentences(folder: Path) -> list[str]:
    """Example sentences of WordNet 3.0, sorted and without doubles.

    `folder` holds `data.noun`, `data.verb`, `data.adj` and `data.adv` (Debian: `/usr/share/wordnet`).
    """
    found: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  "):  # the licence
                continue
            for example in _EXAMPLE.findall(line.partition("|")[2]):
                text = " ".join(example.split())
                if _SHORTEST <= len(text) <= _LONGEST and _PLAIN.fullmatch(text):
                    found.add(text)
    return sorted(found)


def generated_sentences(count: int, seed: int = 0) -> list[str]:
    """Grammatical nonsense that covers every English phone, for when WordNet is not at hand."""
    generator = random.Random(seed)
    people = [
        "my mother",
        "Bob",
        "the judge",
        "a happy baby",
        "the young thief",
        "our boss",
        "Vivian",
        "the chef",
    ]
    actions = [
        "bought",
        "pushed",
        "measured",
        "forgot",
        "rubbed",
        "watched",
        "chose",
        "loved",
        "washed",
        "moved",
    ]
    things = [
        *("a purple umbrella", "five fresh fish", "the old wooden boat", "some apple juice", "his new shoes"),
        *(
            "the beige garage",
            "that big maple table",
            "two thick ropes",
            "a vase of violets",
            "her yellow jumper",
        ),
    ]
    places = [
        "in the park",
        "before breakfast",
        "near the bay",
        "with both thumbs",
        "at the opera",
        "by the river",
    ]
    found: set[str] = set()
    most = len(people) * len(actions) * len(things) * len(places)
    while len(found) < min(count, most):
        words = (generator.choice(part) for part in (people, actions, things, places))
        found.add(" ".join(words).capitalize())
    return sorted(found)


def split_of(sentence: str) -> str:
    """`train`, `valid` or `test`, by the sentence's hash: the same on every machine."""
    bucket = hashlib.sha256(sentence.encode()).digest()[0] % HELD_OUT_SHARE
    return {0: "test", 1: "valid"}.get(bucket, "train")
